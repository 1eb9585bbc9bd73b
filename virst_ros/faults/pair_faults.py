# SPDX-License-Identifier: Apache-2.0
"""What happens to one camera of a segmenter that has two: the masks of the other go on, with its own stamps."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from virst_ros import conversions
from virst_ros.faults.camera_faults import SECOND, alone, nothing, scaled
from virst_ros.faults.fault import RECOVERY_S, Fault, FaultError, Inject, Masks, SeenMask
from virst_ros.faults.harness import Harness
from virst_ros.faults.scripted_camera import RATE_HZ, Shot
from virst_ros.faults.segmenter import Segmenter, wait_until

LEAST_S = 3.0
LEAST_MASKS = 0.3 * RATE_HZ * LEAST_S  # of the other camera: a machine of few cores makes no mask of each image
LEAST_FLOOD_HZ = 5 * RATE_HZ


def _to_left(change: Callable[[Shot], None], rate_hz: float | None = None) -> Inject:
    """The left camera sends what `change` makes of each frame; the right one is judged."""

    @contextmanager
    def inject(harness: Harness) -> Iterator[Segmenter]:
        harness.start_pair()
        begin_s = time.monotonic()
        # The segmenter of one camera rests: what a slow machine can do is for these two.
        with harness.camera.changed(nothing), harness.left.changed(change, rate_hz):
            yield harness.bystander
        harness.cause_is_gone()
        ended_s = time.monotonic()
        if not wait_until(lambda: harness.is_followed(harness.disturbed, ended_s), RECOVERY_S):
            raise FaultError(f"the camera that was disturbed is not followed again within {RECOVERY_S:g} s")
        strange = [mask for mask in harness.disturbed.masks_since(begin_s) if not mask.is_known]
        if strange:
            raise FaultError(f"{len(strange)} masks of the disturbed camera carry a stamp that it never sent")

    return inject


@contextmanager
def _flood(harness: Harness) -> Iterator[Segmenter]:
    """As many images as this machine can send; how many of them arrive depends on it, too, so no word is demanded."""
    sent = 0

    def change(shot: Shot) -> None:
        nonlocal sent
        sent += 1
        alone(shot)

    with _to_left(change, rate_hz=200.0)(harness) as segmenter:
        begin_s, before = time.monotonic(), sent
        yield segmenter
        rate_hz = (sent - before) / (time.monotonic() - begin_s)
    if rate_hz < LEAST_FLOOD_HZ:
        raise FaultError(f"this machine sends {rate_hz:.0f} images per second only: that is no flood")


def undisturbed(masks: list[SeenMask]) -> str:
    """Why these masks of the other camera are not those of a camera that nothing happens to."""
    if len(masks) < LEAST_MASKS:
        return f"only {len(masks)} masks of the other camera came"
    if any(later.stamp_ns <= earlier.stamp_ns for earlier, later in itertools.pairwise(masks)):
        return "the stamps of the other camera's masks went back, or came twice"
    if len({mask.size for mask in masks}) > 1:
        return f"the masks of the other camera changed their size: {sorted({mask.size for mask in masks})}"
    return ""


def _back(shot: Shot) -> None:
    assert shot.image is not None
    shot.stamp(conversions.stamp_ns(shot.image.header.stamp) - 10 * SECOND)


def _fault(name: str, what: str, inject: Inject, told: str) -> Fault:
    return Fault(
        name,
        f"of two cameras, {what}",
        inject,
        Masks.OF_GOAL,
        log=f"left: .*{told}" if told else "",
        diagnostics=told,
        least_s=LEAST_S,
        check=undisturbed,
        two_cameras=True,
    )


FAULTS = (
    _fault("pair_camera_stops", "one stops", _to_left(nothing), "no images on /left/image"),
    _fault(
        "pair_resolution_changes",
        "one changes from 320x240 to 640x480",
        _to_left(lambda shot: shot.show(scaled(640, 480)(shot.rgb))),
        "the image changed from 320x240 rgb8 to 640x480 rgb8",
    ),
    _fault("pair_flood", "one sends up to 200 images per second", _flood, told=""),
    _fault("pair_clock_backwards", "the stamps of one go back by 10 s", _to_left(_back), "went back by"),
    _fault(
        "pair_garbage",
        "one sends images whose second half is missing",
        _to_left(lambda shot: shot.describe(size=320 * 240 * 3 // 2)),
        "it was cut short",
    ),
)
