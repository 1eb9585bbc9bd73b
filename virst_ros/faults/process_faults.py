# SPDX-License-Identifier: Apache-2.0
"""What happens to the segmenter's process: signals, files that are missing, disks that are full, too little memory."""

import json
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image

from virst_engine.video.results import FIGURES, MASKS, OVERLAY
from virst_ros.demo.recorded_run import load_recording
from virst_ros.faults.fault import Fault, FaultError, Inject, Masks
from virst_ros.faults.harness import GOAL, START_S, Harness, console_script
from virst_ros.faults.scripted_camera import Shot
from virst_ros.faults.segmenter import Segmenter, wait_until

LITTLE_MEMORY = 400 << 20  # bytes more than it has when it starts: enough for the weights, too little for the buffers
NO_MEMORY = "allocate memory|MemoryError"  # as torch and Python say it
NO_FILE_GROWS = 4096  # bytes
USAGE_OR_CAUSE = 2  # exit status of `virst` when it says why it cannot go on
CLIP_SIZE = (960, 720)
RECORDING_GROWS, CLIP_FRAMES = 24 << 10, 24  # bytes; enough for the figures of so many frames, too few for their video


def _weights(spoil: bytes | None) -> Inject:
    """Weights that are missing (None) or damaged when the segmenter is configured; then they are mended."""

    @contextmanager
    def inject(harness: Harness) -> Iterator[Segmenter]:
        from virst_engine.config import ModelParameters
        from virst_engine.weights import weights_path

        path = harness.folder / f"spoilt_{time.monotonic_ns()}.safetensors"
        if spoil is not None:
            path.write_bytes(spoil)
        spare = harness.start_spare(active=False, model__weights=str(path))
        if not wait_until(lambda: spare.log_has("cannot configure"), START_S):
            raise FaultError(f"it does not say that it cannot configure; see {spare.log}")
        yield spare
        shutil.copyfile(weights_path(ModelParameters()), path)
        harness.cause_is_gone()
        for transition in ("configure", "activate"):
            if not harness.change_state(spare, transition):
                raise FaultError(f"{transition} has failed although the weights are there now; see {spare.log}")

    return inject


@contextmanager
def _publisher_of_other_quality(harness: Harness) -> Iterator[Segmenter]:
    """A segmenter that insists on reliable images, and a camera that does not offer them."""
    spare = harness.start_spare("-r", "image:=/best_effort", input_qos="DEFAULT", use_depth=False)
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    reliable = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
    publishers = [harness.node.create_publisher(Image, "/best_effort", best_effort)]

    def change(shot: Shot) -> None:
        publishers[-1].publish(shot.image)

    with harness.camera.changed(change):
        yield spare
        publishers.append(harness.node.create_publisher(Image, "/best_effort", reliable))
        harness.cause_is_gone()
        harness.set_base_goal(spare)
        begin_s = time.monotonic()
        wait_until(lambda: harness.is_followed(spare, begin_s), 20.0)
    for publisher in publishers:
        harness.node.destroy_publisher(publisher)


@contextmanager
def _disk_full(harness: Harness) -> Iterator[Segmenter]:
    """Nothing that it writes to files can be written any more: its output, and ROS's own log."""
    harness.log_path("spare", of_next=True).symlink_to("/dev/full")
    spare = harness.start_spare()
    harness.set_base_goal(spare)
    assert spare.process is not None
    begin_s = time.monotonic()
    wait_until(lambda: harness.is_followed(spare, begin_s), 20.0)
    resource.prlimit(spare.process.pid, resource.RLIMIT_FSIZE, (NO_FILE_GROWS, NO_FILE_GROWS))
    for number in range(50):
        harness.set_goal("", spare)  # each is a line of the log
        if number % 10 == 0:
            time.sleep(0.1)
    yield spare


@contextmanager
def _recording_disk_full(harness: Harness) -> Iterator[None]:
    """`virst segment` records beside the segmenter, and no file may become larger than RECORDING_GROWS."""
    folder = harness.folder / f"recording_{time.monotonic_ns()}"
    clip, out = folder / "clip", folder / "out"
    clip.mkdir(parents=True)
    run = load_recording()
    for number in range(CLIP_FRAMES):
        enlarged = cv2.resize(run.images_rgb_u8[number], CLIP_SIZE)  # its video is much larger than its figures
        cv2.imwrite(str(clip / f"{number}.png"), enlarged[..., ::-1])
    command = [*console_script("virst", "virst_engine.cli"), "segment", str(clip), "--goal", GOAL, "--out", str(out)]
    process = harness.start("recording", [*command, "--threads", "1"])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (RECORDING_GROWS, RECORDING_GROWS))
    log = harness.log_path("recording")
    try:
        status = process.wait(START_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.wait()
        raise FaultError(f"the recording has not ended within {START_S:g} s; see {log}") from error
    said = log.read_text(errors="replace")
    harness.answers.append(said.strip().rpartition("\n")[2])
    if status != USAGE_OR_CAUSE or "Traceback" in said:
        raise FaultError(f"the recording has ended with status {status}, and not with the cause; see {log}")
    problem = why_not_readable(out, CLIP_FRAMES)
    if problem:
        raise FaultError(f"what is left of the recording cannot be used: {problem}")
    yield


def why_not_readable(folder: Path, frames: int) -> str:
    """Why what `virst segment` has left on a full disk is no remainder of that many frames; empty when it is."""
    masks = sorted((folder / MASKS).iterdir())
    if len(masks) != frames:
        return f"{len(masks)} masks of {frames}"
    unreadable = [path.name for path in masks if cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is None]
    if unreadable:
        return f"no images: {', '.join(unreadable)}"
    overlay = folder / OVERLAY
    if overlay.exists() and not cv2.VideoCapture(str(overlay)).isOpened():
        return f"{OVERLAY} cannot be played"
    try:
        told = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{FIGURES} cannot be read ({error})"
    if told["is_complete"] or len(told["frames"]) != frames:
        return f"{FIGURES} says is_complete {told['is_complete']} with {len(told['frames'])} frames"
    return ""


def _address_space(pid: int) -> int:
    """Bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmSize:")))


@contextmanager
def _too_little_memory(harness: Harness) -> Iterator[Segmenter]:
    """Buffers of gigabytes in a process that may not have them; it goes on, and ends when it is told to."""
    spare = harness.start_spare(
        active=False, autostart=False, tracking__max_objects=254, memory__anchor_slots=64, memory__ring_steps=4096
    )
    harness.state(spare)
    assert spare.process is not None
    allowed = _address_space(spare.process.pid) + LITTLE_MEMORY
    resource.prlimit(spare.process.pid, resource.RLIMIT_AS, (allowed, allowed))
    if harness.change_state(spare, "configure"):
        raise FaultError("it has configured itself with buffers that it cannot have")
    if not wait_until(lambda: spare.told(NO_MEMORY, 0.0), 10.0):
        raise FaultError("no word of memory in the diagnostics after the failure")
    spare.process.send_signal(signal.SIGINT)
    yield spare


@contextmanager
def _parameter_file(harness: Harness, text: str | None) -> Iterator[Segmenter]:
    path = harness.folder / "parameters.yaml"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text, encoding="utf-8")
    yield harness.start_spare("--params-file", str(path), active=False)


def _with_parameter_file(text: str | None) -> Inject:
    """Started with a parameter file of that text; None: there is no such file."""
    return lambda harness: _parameter_file(harness, text)


@contextmanager
def _sim_time_without_clock(harness: Harness) -> Iterator[Segmenter]:
    """use_sim_time is set, and nobody publishes /clock; then somebody does."""
    spare = harness.start_spare(use_sim_time=True)
    harness.set_base_goal(spare)
    begin_s = time.monotonic()
    wait_until(lambda: harness.is_followed(spare, begin_s), 20.0)
    yield spare
    publisher = harness.node.create_publisher(Clock, "/clock", 10)

    def change(shot: Shot) -> None:
        publisher.publish(Clock(clock=harness.node.get_clock().now().to_msg()))

    with harness.camera.changed(change):
        harness.cause_is_gone()
        begin_s = time.monotonic()
        wait_until(lambda: harness.is_followed(spare, begin_s), 20.0)
    harness.node.destroy_publisher(publisher)


@contextmanager
def _told_during_configure(harness: Harness) -> Iterator[Segmenter]:
    """SIGTERM while it loads its model."""
    spare = harness.start_spare(active=False, autostart=False)
    harness.state(spare)
    asking = threading.Thread(target=_configure, args=(harness, spare))
    asking.start()
    time.sleep(0.15)
    assert spare.process is not None
    spare.process.send_signal(signal.SIGTERM)
    yield spare
    asking.join()


def _configure(harness: Harness, spare: Segmenter) -> None:
    try:
        harness.change_state(spare, "configure")
    except FaultError:
        return  # it has ended before it could answer


def _told(number: signal.Signals) -> Inject:
    """The signal while frames, goals and the reasoner keep it busy."""

    @contextmanager
    def inject(harness: Harness) -> Iterator[None]:
        for sentence in ("the blue can", "the green box", "the yellow box"):
            harness.set_goal(sentence)
        with harness.camera.changed(lambda _: None, rate_hz=60.0):
            time.sleep(1.5)
            assert harness.segmenter.process is not None
            harness.segmenter.process.send_signal(number)
            yield

    return inject


FAULTS = (
    Fault(
        "weights_missing",
        "no weights when it is configured; then they are there",
        _weights(None),
        Masks.NONE,
        log="cannot configure: .*no file",
        diagnostics="no file .*spoilt",
    ),
    Fault(
        "weights_damaged",
        "damaged weights when it is configured; then they are mended",
        _weights(b"not weights at all" * 100),
        Masks.NONE,
        log="cannot configure: .*spoilt",
        diagnostics="spoilt.*(damaged|not)",
    ),
    Fault(
        "publisher_incompatible",
        "the camera offers best effort, the segmenter insists on reliable",
        _publisher_of_other_quality,
        Masks.NONE,
        log="offers another RELIABILITY",
        diagnostics="offers another RELIABILITY",
    ),
    Fault("disk_full", "no log can be written any more", _disk_full, Masks.OF_GOAL, least_s=2.0),
    Fault(
        "disk_full_recording",
        "the recording of `virst segment` does not fit on the disk",
        _recording_disk_full,
        Masks.OF_GOAL,
        answer=r"cannot write .*overlay\.mp4.*make room",
        least_s=2.0,
    ),
    Fault(
        "sim_time_without_clock",
        "use_sim_time is set, but nobody publishes /clock; then somebody does",
        _sim_time_without_clock,
        Masks.OF_GOAL,
        log="nobody publishes /clock",
        diagnostics="nobody publishes /clock",
    ),
    Fault(
        "memory_too_little",
        "parameters ask for more memory than there is; then it is told to end",
        _too_little_memory,
        Masks.NONE,
        log=f"cannot configure: .*({NO_MEMORY})",
        ends=0,
    ),
    Fault(
        "parameter_file_missing",
        "it is started with a parameter file that is not there",
        _with_parameter_file(None),
        Masks.NONE,
        log="parameters.yaml",
        ends=1,
    ),
    Fault(
        "parameter_file_broken",
        "it is started with a parameter file that is no YAML",
        _with_parameter_file("/**: {ros__parameters: [1, 2\n  - x: :"),
        Masks.NONE,
        log="parameters.yaml",
        ends=1,
    ),
    Fault("sigterm_during_configure", "SIGTERM while it loads its model", _told_during_configure, Masks.NONE, ends=0),
    Fault("sigint_under_load", "SIGINT with 4 goals at 60 Hz", _told(signal.SIGINT), Masks.NONE, ends=0),
    Fault("sigterm_under_load", "SIGTERM with 4 goals at 60 Hz", _told(signal.SIGTERM), Masks.NONE, ends=0),
)
