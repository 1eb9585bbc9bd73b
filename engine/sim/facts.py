# SPDX-License-Identifier: Apache-2.0
"""What is true of the objects in a window of frames, with three values: no (0), cannot be said clearly (1), yes (2).

Lengths in the image are in image widths (a height counts 3/4), so a number means the same in any image size.
Only clear differences are yes or no; a sentence is used when no object leaves it in doubt.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from virst_engine.errors import SceneError
from virst_engine.sim import geometry
from virst_engine.sim.recording import Recording
from virst_engine.sim.spec import SIZES, VIEW_ASPECT

Tri = Int[np.ndarray, " n"]
NO, UNCLEAR, YES = 0, 1, 2  # in this order, so that `both` is a minimum

SEEN = 0.5  # visible fraction from which an object counts as seen
RECENT_S = 0.6
STEP_MOVING = 0.05  # image widths per second
STEP_STILL = 0.02
MOVED = 0.12
STAYED = 0.02


def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kleene's and."""
    return np.minimum(a, b)


def negation(a: np.ndarray) -> np.ndarray:
    return YES - a


def crisp(yes: np.ndarray) -> np.ndarray:
    """YES where `yes`, else NO."""
    return yes.astype(np.int8) * np.int8(YES)


def tri(yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """YES where `yes`, NO where `no` (and not yes), else UNCLEAR."""
    return np.where(yes, YES, np.where(no, NO, UNCLEAR)).astype(np.int8)


def the_only(a: np.ndarray) -> int | None:
    """The object meant by a singular noun, or None if it means none or more, or leaves doubt."""
    if (a == UNCLEAR).any() or np.count_nonzero(a == YES) != 1:
        return None
    return int(np.argmax(a == YES))


class Facts:
    """Facts of the frames (query - window, query] of a recording; each property is worked out when asked for.

    Letters: n objects, t frames of the window.

    Raises:
        SceneError: `query_frame` is not a frame of the recording or the window is empty.
    """

    def __init__(self, recording: Recording, query_frame: int, window_frames: int):
        if not 0 <= query_frame < len(recording):
            raise SceneError(f"query frame {query_frame} is not in 0..{len(recording) - 1}; choose a recorded frame")
        if window_frames < 1:
            raise SceneError(f"a window needs at least 1 frame, got {window_frames}")
        first = max(0, query_frame - window_frames + 1)
        window = slice(first, query_frame + 1)
        spec = recording.spec
        self.spec, self.fps = spec, recording.fps
        self.objects = spec.objects
        self.n, self.frames = len(spec.objects), query_frame + 1 - first
        self.view = geometry.ViewGeometry(spec.camera)
        self.position = recording.position_m[window].astype(float)
        self.quaternion = recording.quaternion_wxyz[window].astype(float)
        self.velocity = recording.velocity_m_s[window].astype(float)
        self.visible = recording.visible_fraction[window]
        self.in_view = recording.in_view_fraction[window]
        self.area = recording.area_fraction[query_frame].astype(float)
        centre = recording.centre_px[window].astype(float) / (recording.width, recording.height)
        self.xy = centre * (1.0, 1.0 / VIEW_ASPECT)  # image widths
        self.depth = self.view.depth_m(self.position[-1])
        self.rotation = geometry.rotation_of(self.quaternion[-1])
        self.shape = np.array([o.shape for o in spec.objects])
        self.colour = np.array([o.colour for o in spec.objects])
        self.size = np.array([o.size for o in spec.objects])

    # what is seen

    @cached_property
    def seen(self) -> np.ndarray:
        """(t, n) bool."""
        return (self.visible >= SEEN) & (self.in_view >= SEEN)

    @cached_property
    def ever_shown(self) -> np.ndarray:
        """(n,) bool: a part of it shows at some time of the window; the others do not exist for a sentence."""
        return (self.visible * self.in_view > 0.1).any(axis=0)

    @cached_property
    def seen_now(self) -> Tri:
        """Seen in the newest frame; unclear if it shows otherwise in the window."""
        return tri(self.seen[-1], ~self.ever_shown)

    @cached_property
    def known(self) -> Tri:
        """Seen in the newest frame or, in `full` scenes, for half of the window."""
        if self.spec.family == "plain":
            return self.seen_now
        mostly: np.ndarray = np.greater_equal(self.seen.mean(axis=0), 0.5)
        return tri(self.seen[-1] | mostly, ~self.ever_shown)

    @cached_property
    def seen_throughout(self) -> Tri:
        return tri(np.asarray(self.seen.all(axis=0)), ~self.ever_shown)

    # what it is

    def shape_is(self, shape: str) -> Tri:
        return crisp(self.shape == shape)

    def colour_is(self, colour: str) -> Tri:
        return crisp(self.colour == colour)

    def size_is(self, size: str) -> Tri:
        """Small or large, clear only where its size in the image agrees: smaller than every large one of its shape."""
        is_size = crisp(self.size == size)
        for k in range(self.n):
            for j in range(self.n):
                if self.shape[j] != self.shape[k] or self.size[j] == self.size[k]:
                    continue
                small, large = (k, j) if self.size[k] == SIZES[0] else (j, k)
                if self.area[large] < 1.35 * self.area[small]:
                    is_size[k] = UNCLEAR
        return is_size

    # how it stands

    @cached_property
    def axis_up(self) -> Float[np.ndarray, "n 3"]:
        """How vertical each own axis is, 0..1."""
        return np.abs(self.rotation[:, 2, :])

    @cached_property
    def stands(self) -> Tri:
        return tri(self.axis_up[:, 2] > 0.95, self.axis_up[:, 2] < 0.3)

    @cached_property
    def lift(self) -> Float[np.ndarray, " n"]:
        """Height of the lowest point above the table, metres."""
        return np.array(
            [geometry.contact_spot(o, self.position[-1, k], self.rotation[k])[1] for k, o in enumerate(self.objects)]
        )

    @cached_property
    def rolls(self) -> Tri:
        """Can roll as it is now: round things, and a can that lies; a can that stands cannot."""
        is_round = np.isin(self.shape, ("ball", "egg", "capsule"))
        is_can = self.shape == "can"
        return tri(is_round | (is_can & (self.stands == NO)), ~is_round & ~(is_can & (self.stands == UNCLEAR)))

    @cached_property
    def flat_on_top(self) -> Tri:
        is_box = self.shape == "box"
        flat = is_box & (self.axis_up.max(axis=1) > 0.95)
        is_round_bodied = np.isin(self.shape, ("can", "plate"))
        flat |= is_round_bodied & (self.stands == YES)
        tilted = (is_box & ~flat) | (is_round_bodied & (self.stands == UNCLEAR)) | (self.lift > 0.02)
        result = tri(flat, ~flat)
        result[tilted] = UNCLEAR
        return result

    @cached_property
    def slenderness(self) -> Float[np.ndarray, " n"]:
        """Height over width as it stands now; 1 for round things."""
        ratio = np.ones(self.n)
        for k, thing in enumerate(self.objects):
            a, b, c = thing.half_m
            if thing.shape == "box":
                half = np.array([a, b, c])
                up = int(np.argmax(self.axis_up[k]))
                ratio[k] = half[up] / np.delete(half, up).min()
            elif thing.shape in ("can", "plate"):
                ratio[k] = c / a if self.axis_up[k, 2] > 0.7 else 0.9
        return ratio

    @cached_property
    def tips_over(self) -> Tri:
        return tri(self.slenderness >= 2.0, self.slenderness <= 1.5)

    @cached_property
    def about_to_fall(self) -> Tri:
        """Hangs in the air, not yet falling."""
        hangs = (self.lift > 0.06) & (np.linalg.norm(self.velocity[-1], axis=1) < 0.02)
        return tri(hangs, self.lift < 0.01)

    @cached_property
    def height(self) -> Float[np.ndarray, " n"]:
        tops = []
        for k, thing in enumerate(self.objects):
            a, b, c = thing.half_m
            if thing.shape == "box":
                tops.append(2 * float(np.abs(self.rotation[k, 2]) @ (a, b, c)))
            elif thing.shape in ("can", "plate"):
                z = float(abs(self.rotation[k, 2, 2]))
                tops.append(2 * (c * z + a * float(np.sqrt(max(0.0, 1 - z * z)))))
            elif thing.shape == "capsule":
                tops.append(2 * (a + c * float(abs(self.rotation[k, 2, 2]))))
            else:
                tops.append(2 * float(np.sqrt(self.rotation[k, 2] ** 2 @ np.square((a, b, c)))))
        return np.array(tops)

    # where it is, compared with the others: (n, n), row = the target, column = what it is compared with

    def _pairs(self, amount: np.ndarray, yes: float, no: float) -> np.ndarray:
        """YES where the row's amount exceeds the column's by `yes`, NO where it does not by `no`."""
        difference = amount[:, None] - amount[None, :]
        result = tri(difference >= yes, difference <= no)
        np.fill_diagonal(result, NO)
        return result

    @cached_property
    def left_of(self) -> np.ndarray:
        return self._pairs(-self.xy[-1, :, 0], 0.08, 0.01)

    @cached_property
    def right_of(self) -> np.ndarray:
        return self._pairs(self.xy[-1, :, 0], 0.08, 0.01)

    @cached_property
    def behind(self) -> np.ndarray:
        return both(self._pairs(self._ground_distance, 0.07, 0.01), self._on_table_pair)

    @cached_property
    def in_front_of(self) -> np.ndarray:
        return both(self._pairs(-self._ground_distance, 0.07, 0.01), self._on_table_pair)

    @cached_property
    def _ground_distance(self) -> Float[np.ndarray, " n"]:
        """How far away on the table, along the camera's horizontal viewing direction, metres."""
        away = self.view.axes[2, :2] / np.linalg.norm(self.view.axes[2, :2])
        return (self.position[-1, :, :2] - self.view.position[:2]) @ away

    @cached_property
    def _on_table_pair(self) -> np.ndarray:
        low = self.lift < 0.02
        return np.where(low[:, None] & low[None, :], YES, UNCLEAR).astype(np.int8)

    def nearest_to(self, anchor: int, among: np.ndarray) -> Tri:
        """The one of `among` nearest to an object, on the table and in the image alike."""
        candidates = (among != NO) & (np.arange(self.n) != anchor)
        result = np.zeros(self.n, np.int8)
        if not candidates.any():
            return result
        on_table = np.linalg.norm(self.position[-1] - self.position[-1, anchor], axis=1)
        in_image = np.linalg.norm(self.xy[-1] - self.xy[-1, anchor], axis=1)
        return best_of(-on_table, candidates, 0.0, 1.3, second=-in_image)

    # how it moved

    @cached_property
    def _path(self) -> Float[np.ndarray, " n"]:
        steps = np.diff(self.xy, axis=0)
        return np.linalg.norm(steps, axis=2).sum(axis=0) if self.frames > 1 else np.zeros(self.n)

    @cached_property
    def _recent_frames(self) -> int:
        return max(1, min(self.frames - 1, round(RECENT_S * self.fps)))

    @cached_property
    def _shift(self) -> Float[np.ndarray, "n 2"]:
        return self.xy[-1] - self.xy[0]

    @cached_property
    def _recent(self) -> Float[np.ndarray, "n 2"]:
        return self.xy[-1] - self.xy[-1 - self._recent_frames] if self.frames > 1 else np.zeros((self.n, 2))

    def _while_seen(self, result: np.ndarray) -> Tri:
        """A motion is only known of what was seen throughout."""
        if self.frames < 2:
            return np.full(self.n, UNCLEAR, np.int8)
        return np.where(self.seen_throughout == UNCLEAR, UNCLEAR, result).astype(np.int8)

    def _along(self, amount: np.ndarray, across: np.ndarray, recent: np.ndarray, lowest: np.ndarray) -> Tri:
        yes = (amount >= MOVED) & (amount >= 1.3 * np.abs(across)) & (recent >= 0.025)
        no = (amount <= 0.03) & (lowest >= -0.04) & (recent <= 0.012)
        return self._while_seen(tri(yes, no))

    @cached_property
    def moving_right(self) -> Tri:
        x = self.xy[:, :, 0]
        return self._along(self._shift[:, 0], self._depth_shift, self._recent[:, 0], -(x.max(axis=0) - x[0]))

    @cached_property
    def moving_left(self) -> Tri:
        x = self.xy[:, :, 0]
        return self._along(-self._shift[:, 0], self._depth_shift, -self._recent[:, 0], x.min(axis=0) - x[0])

    @cached_property
    def _depth_path(self) -> Float[np.ndarray, "t n"]:
        """Way along the camera's horizontal viewing direction since the window's start, in widths of the view there."""
        away = self.view.axes[2, :2] / np.linalg.norm(self.view.axes[2, :2])
        width_m = self.depth / self.view.scale[0]
        return (self.position[:, :, :2] - self.position[0, :, :2]) @ away / width_m

    @property
    def _depth_shift(self) -> Float[np.ndarray, " n"]:
        return self._depth_path[-1]

    @cached_property
    def moving_away(self) -> Tri:
        d = self._depth_path
        recent = d[-1] - d[-1 - self._recent_frames] if self.frames > 1 else d[-1]
        return self._along(d[-1], self._shift[:, 0], recent, -d.max(axis=0))

    @cached_property
    def moving_toward(self) -> Tri:
        d = self._depth_path
        recent = d[-1] - d[-1 - self._recent_frames] if self.frames > 1 else d[-1]
        return self._along(-d[-1], self._shift[:, 0], -recent, d.min(axis=0))

    @cached_property
    def moving(self) -> Tri:
        """Has come a clear way in the window and still moves."""
        shift, recent = np.linalg.norm(self._shift, axis=1), np.linalg.norm(self._recent, axis=1)
        on_table = np.abs(self.position[:, :, 2] - self.position[-1, :, 2]).max(axis=0) < 0.03
        return self._while_seen(tri((shift >= 0.08) & (recent >= 0.025) & on_table, self._path <= STAYED))

    @cached_property
    def still(self) -> Tri:
        return self._while_seen(tri(self._path <= STAYED, self._path >= 0.07))

    @cached_property
    def turned(self) -> Float[np.ndarray, " n"]:
        """Radians it turned in the window, summed over frames."""
        dots = np.abs((self.quaternion[1:] * self.quaternion[:-1]).sum(axis=2))
        return (2 * np.arccos(np.clip(dots, 0, 1))).sum(axis=0) if self.frames > 1 else np.zeros(self.n)

    @cached_property
    def rolling(self) -> Tri:
        turns = tri((self.turned >= 1.0) & (self.rolls == YES), self.turned < 0.4)
        return both(self.moving, self._while_seen(turns))

    @cached_property
    def sliding(self) -> Tri:
        slides = tri((self.turned < 0.4) & (self.rolls == NO), (self.turned >= 1.0) & (self.rolls == YES))
        return both(self.moving, self._while_seen(slides))

    @cached_property
    def fell(self) -> Tri:
        """Came down from the air in the window and lies on the table now."""
        drop = self.position[:, :, 2].max(axis=0) - self.position[-1, :, 2]
        rests = (self.lift < 0.015) & (np.abs(self.velocity[-1, :, 2]) < 0.05)
        return self._while_seen(tri((drop >= 0.07) & rests, drop <= 0.015))

    def fastest(self, among: np.ndarray) -> Tri:
        """The one of `among` that came clearly farthest, while another one moves too."""
        path = np.where(self.still == YES, 0.0, self._path)
        candidates = among != NO
        if (self._while_seen(among)[candidates] == UNCLEAR).any():
            return np.where(candidates, UNCLEAR, NO).astype(np.int8)
        ranked = np.sort(path[candidates])[::-1]
        if len(ranked) < 2 or ranked[1] < 0.05:
            return np.where(candidates, UNCLEAR, NO).astype(np.int8)
        result = best_of(path, candidates, 0.08, 1.5)
        return np.where(candidates & (result == YES) & (self.moving != YES), UNCLEAR, result).astype(np.int8)

    # what happened, in order

    @cached_property
    def episodes(self) -> list[list[tuple[int, int]] | None]:
        """Per object, its movements as (first moving frame, last moving frame) of the window; None where unclear."""
        result: list[list[tuple[int, int]] | None] = []
        for k in range(self.n):
            result.append(self._episodes_of(k) if self.seen[:, k].all() and self.frames > 2 else None)
        return result

    def _episodes_of(self, k: int) -> list[tuple[int, int]] | None:
        step = np.linalg.norm(np.diff(self.xy[:, k], axis=0), axis=1) * self.fps
        busy = step > STEP_STILL
        runs: list[tuple[int, int]] = []
        for frame in np.flatnonzero(busy).tolist():
            if runs and frame - runs[-1][1] <= 1 + round(0.15 * self.fps):
                runs[-1] = (runs[-1][0], frame)
            else:
                runs.append((frame, frame))
        episodes = []
        for first, last in runs:
            way = float(np.linalg.norm(self.xy[last + 1, k] - self.xy[first, k]))
            if way >= 0.06 and step[first : last + 1].max() > STEP_MOVING:
                episodes.append((first, last + 1))
            elif way > 0.012:
                return None  # something between a movement and none
        return episodes

    def _frames_of(self, seconds: float) -> int:
        return max(1, round(seconds * self.fps))

    def _per_object(self, decide: Callable[[list[tuple[int, int]]], int]) -> Tri:
        values = [
            NO if not self.ever_shown[k] else UNCLEAR if e is None else decide(e) for k, e in enumerate(self.episodes)
        ]
        return np.array(values, np.int8)

    def moved_before(self, anchor: int) -> Tri:
        """Its movements began clearly before the anchor's first; a movement before the window counts as early."""
        other = self.episodes[anchor]
        if not other or other[0][0] == 0:
            return np.full(self.n, UNCLEAR, np.int8)
        gap, onset = self._frames_of(0.4), other[0][0]

        def decide(mine: list[tuple[int, int]]) -> int:
            if not mine or mine[0][0] >= onset + gap:
                return NO
            return YES if mine[-1][0] <= onset - gap else UNCLEAR

        return self._except(anchor, self._per_object(decide))

    def moved_after(self, anchor: int) -> Tri:
        """Its movements began clearly after the anchor's last movement ended."""
        other = self.episodes[anchor]
        if not other:
            return np.full(self.n, UNCLEAR, np.int8)
        gap, end, onset = self._frames_of(0.2), other[-1][1], other[0][0]

        def decide(mine: list[tuple[int, int]]) -> int:
            if not mine or mine[-1][0] <= onset - gap:
                return NO
            return YES if mine[0][0] >= end + gap else UNCLEAR

        return self._except(anchor, self._per_object(decide))

    def stopped_before(self, anchor: int) -> Tri:
        """It moved, and came to rest clearly before the anchor's first movement."""
        other = self.episodes[anchor]
        if not other or other[0][0] == 0:
            return np.full(self.n, UNCLEAR, np.int8)
        gap, onset = self._frames_of(0.2), other[0][0]

        def decide(mine: list[tuple[int, int]]) -> int:
            if not mine or mine[0][0] >= onset + gap:
                return NO
            return YES if mine[-1][1] <= onset - gap else UNCLEAR

        return self._except(anchor, self._per_object(decide))

    def _except(self, anchor: int, result: np.ndarray) -> Tri:
        result[anchor] = NO
        return result

    def moved_first(self, among: np.ndarray) -> Tri:
        return self._extreme_onset(among, lambda e: -e[0][0])

    def moved_last(self, among: np.ndarray) -> Tri:
        return self._extreme_onset(among, lambda e: e[-1][0])

    def _extreme_onset(self, among: np.ndarray, amount: Callable[[list[tuple[int, int]]], int]) -> Tri:
        candidates = among != NO
        unclear = np.where(candidates, UNCLEAR, NO).astype(np.int8)
        if any(self.episodes[k] is None and self.ever_shown[k] for k in np.flatnonzero(candidates)):
            return unclear
        onsets = {int(k): amount(e) for k in np.flatnonzero(candidates) if (e := self.episodes[k])}
        ranked = sorted(onsets.values(), reverse=True)
        if len(ranked) < 2 or ranked[0] - ranked[1] < self._frames_of(0.4):
            return unclear
        return crisp(np.array([onsets.get(k) == ranked[0] for k in range(self.n)]))

    @cached_property
    def stopped(self) -> Tri:
        rest = self._frames_of(0.3)
        last = self.frames - 1

        def decide(mine: list[tuple[int, int]]) -> int:
            if not mine or mine[-1][1] >= last:
                return NO
            return YES if mine[-1][1] <= last - rest else UNCLEAR

        return self._per_object(decide)

    @cached_property
    def started(self) -> Tri:
        """Still at first, moving now."""
        last, rest = self.frames - 1, self._frames_of(0.4)

        def decide(mine: list[tuple[int, int]]) -> int:
            if not mine or mine[-1][1] <= last - rest:
                return NO
            moves_now, was_still = mine[-1][1] >= last, mine[0][0] >= rest
            return YES if moves_now and was_still and len(mine) == 1 else UNCLEAR

        return self._per_object(decide)

    def moved_times(self, count: int) -> Tri:
        """Moved exactly so often within the window, from rest to rest or to now."""

        def decide(mine: list[tuple[int, int]]) -> int:
            if mine and mine[0][0] == 0:
                return UNCLEAR
            return YES if len(mine) == count else NO

        return self._per_object(decide)

    def _gap(self, gone: np.ndarray) -> Tri:
        """Seen, then `gone` (t, n) for 0.4 s or more, and seen now."""
        long = gone.sum(axis=0) >= self._frames_of(0.4)
        first = gone.argmax(axis=0)
        before = np.array([self.seen[: first[k], k].any() if gone[:, k].any() else False for k in range(self.n)])
        never = self.seen.all(axis=0) | ~self.ever_shown
        return tri(long & before & self.seen[-1], never)

    @cached_property
    def came_back(self) -> Tri:
        return self._gap(self.in_view < 0.1)

    @cached_property
    def was_hidden(self) -> Tri:
        return self._gap((self.visible < 0.15) & (self.in_view > 0.9))

    @cached_property
    def entered(self) -> Tri:
        """Out of the view at first, seen now, and never seen before in the window."""
        out_first = (self.in_view[: self._frames_of(0.3)] < 0.1).all(axis=0)
        onset = np.array([np.argmax(self.seen[:, k]) for k in range(self.n)])
        stayed = np.array([self.seen[onset[k] :, k].all() for k in range(self.n)])
        return tri(out_first & self.seen[-1] & stayed, self.seen.all(axis=0) | ~self.ever_shown)


def best_of(
    amount: np.ndarray, candidates: np.ndarray, difference: float, ratio: float, second: np.ndarray | None = None
) -> Tri:
    """The candidate whose amount is largest by `difference` and by `ratio`; all candidates are unclear if none is.

    Args:
        second: another measure that must agree on the same one by the same ratio (and any difference).
    """
    result = np.zeros(len(amount), np.int8)
    ids = np.flatnonzero(candidates)
    if len(ids) == 0:
        return result
    best = int(ids[np.argmax(amount[ids])])
    for measure, least in ((amount, difference), (second, 0.0)):
        if measure is None:
            continue
        for k in ids:
            if k == best:
                continue
            high, low = float(measure[best]), float(measure[k])
            # of negative amounts (distances) the larger one is the smaller in size
            clear = high - low >= least and (high >= ratio * low if low >= 0 else low <= ratio * high)
            if not clear or high <= low:
                result[candidates] = UNCLEAR
                return result
    result[best] = YES
    return result
