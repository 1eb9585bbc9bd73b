# SPDX-License-Identifier: Apache-2.0
"""What is left out when frames take longer than `tracking.deadline_ms`, in steps, and when it comes back.

Only times go in and a level comes out; nothing here measures or acts. A level is left downwards when the median of the
newest frames is above the deadline, so that a few slow frames never count, and upwards when what the better level is
going to take fits with a margin. That prediction is the saving that was measured on the way down. It may have been
measured while the load of the machine changed: it grows old, and a better level is tried in the end. A try that fails
is repeated ever later.

With several cameras, steps that hold more frames take longer. Times are compared with those of steps of as many frames:
one kind that is late is enough to leave something out, and all kinds have to fit before it comes back.
"""

import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from virst_engine.fast.memory_bank import Recall

LATE_FRAMES = 8  # whose median decides that frames are late
STEADY_FRAMES = 32  # whose upper quartile has to fit before something comes back
RETURN_AFTER_FRAMES = 40  # at a level, at the least, before a better one is tried
FAILED_WITHIN_FRAMES = 200  # a return that lasted no longer was a mistake
PATIENCE_GROWS = 4  # times, with each mistake
MOST_PATIENCE = 16  # times RETURN_AFTER_FRAMES that is waited after many mistakes
MARGIN = 0.9  # of the deadline that a better level may take
SAVING_HALF_LIFE_FRAMES = 600
FIRST_FRAMES, SETTLING_FRAMES = 5, 2  # that are not looked at: after the start, after a change
OFTEN_STEPS = 64  # in which LATE_FRAMES steps of one number of frames make this number one that counts as late
FORGOTTEN_AFTER_STEPS = 600  # without a step of that number of frames; cameras in and out of step take turns for long

NO_MORE = "there is no more to leave out"
FEWER_MEMORIES = Recall(anchors=1, recent=2, pointers=3)
SMALLER_INPUTS = (3 / 4, 1 / 2)  # of the model's own
SMALLEST_INPUT_PX = 96
SKIPS = (2, 3, 4)
# How many times cheaper a level can be than the one before it. Attention over images costs the fourth power of a side.
MOST_SAVED_BY_MEMORIES, POWER_OF_SIDE = 2.5, 4


@dataclass(frozen=True)
class Level:
    """What is left out. Each level leaves out what the ones before it do."""

    recall: Recall | None = None  # None: everything
    image_size: int = 0  # side of the square input, pixels; 0: the model's own
    takes_every: int = 1  # of so many frames of a camera one is looked at
    most_saved: float = 1.0  # times cheaper than the level before, at the most
    words: str = ""  # for people; empty: nothing is left out


def smaller_sizes(image_size: int) -> list[int]:
    """The sides of the inputs that take the place of a model's own, multiples of 32 pixels, largest first."""
    sizes = (round(image_size * part) // 32 * 32 for part in SMALLER_INPUTS)
    return [size for size in dict.fromkeys(sizes) if SMALLEST_INPUT_PX <= size < image_size]


def levels(image_size: int, *, fewer_memories: bool, smaller: Sequence[int]) -> tuple[Level, ...]:
    """From nothing left out to the most that may be.

    Args:
        image_size: side of the model's own input.
        fewer_memories: they save time.
        smaller: sides of the inputs that can take its place, largest first.
    """
    found = [Level()]
    if fewer_memories:
        found.append(Level(FEWER_MEMORIES, most_saved=MOST_SAVED_BY_MEMORIES, words="remembers fewer frames"))
    for size in smaller:
        before = found[-1]
        words = f"sees images of {size} px instead of {image_size}"
        found.append(
            replace(
                before,
                image_size=size,
                most_saved=((before.image_size or image_size) / size) ** POWER_OF_SIDE,
                words=f"remembers fewer frames, {words}" if before.recall else words,
            )
        )
    last = found[-1]
    for every in SKIPS:
        words = f"takes one frame of {every}"
        found.append(replace(last, takes_every=every, words=f"{last.words}, {words}" if last.words else words))
    return tuple(found)


class Deadline:
    """The level for the next frame, from the times of those before."""

    def __init__(self, levels: Sequence[Level], *, parameter: str = "tracking.deadline_ms") -> None:
        """`parameter`: what the words call the deadline."""
        self._levels, self._parameter = tuple(levels), parameter
        self._savings = [1.0] * len(self._levels)  # times that a level was cheaper than the one before it
        self._patience = [1] * len(self._levels)
        self._windows: dict[int, deque[tuple[int, float]]] = {}  # frames in a step -> (self._frames then, its time)
        self._waited: deque[bool] = deque(maxlen=LATE_FRAMES)
        self._cameras: deque[tuple[str, ...]] = deque(maxlen=STEADY_FRAMES)  # of the newest steps
        self._number = 0
        self._ignored = FIRST_FRAMES
        self._frames = 0  # steps looked at since the last change
        self._has_returned = False  # the last change was one for the better
        self._before_s: dict[int, float] = {}  # what steps took at the level before, to be compared
        self.words = ""

    @property
    def level(self) -> Level:
        return self._levels[self._number]

    @property
    def number(self) -> int:
        """Of the level; 0: nothing is left out."""
        return self._number

    def note(
        self,
        step_s: float,
        deadline_s: float,
        step: int,
        *,
        cameras: Sequence[str] = ("",),
        waited: bool = True,
        may_skip: bool = False,
    ) -> bool:
        """Take the time of one step; whether `words` has changed, and perhaps `level`.

        What counts is the time of the step, for all of its frames are through at its end. While frames are skipped, it
        is the time per frame of a camera: a step that takes twice the deadline is on time with every second frame,
        unless other cameras have steps of their own in between.

        Args:
            deadline_s: 0 = there is none.
            step: the frame's, for the words.
            cameras: whose frames were in the step, one of each.
            waited: a frame was there already when the step before was over and its results handed on. Frames are
                skipped only where most of them wait: where they do not, fewer of them are not sooner.
            may_skip: frames that are to be left out will be.
        """
        if deadline_s <= 0:
            return self._no_deadline()
        if self._ignored:
            self._ignored -= 1
            return False
        self._frames += 1
        self._waited.append(waited)
        self._cameras.append(tuple(cameras))
        frames = len(cameras)
        window = self._windows.setdefault(frames, deque(maxlen=STEADY_FRAMES))
        window.append((self._frames, step_s))
        oldest = self._frames - FORGOTTEN_AFTER_STEPS
        self._windows = {number: each for number, each in self._windows.items() if each[-1][0] > oldest}
        if len(window) < LATE_FRAMES:
            return False
        newest_s = _newest_s(window)
        if frames in self._before_s:
            saved = self._before_s[frames] / max(newest_s, 1e-9)
            self._savings[self._number] = min(max(saved, 1.0), self.level.most_saved)
            self._before_s = {}
        is_often = window[-LATE_FRAMES][0] > self._frames - OFTEN_STEPS
        if is_often and newest_s * self._per_frame() > deadline_s:
            return self._degrade(newest_s, deadline_s, step, may_skip=may_skip)
        if self._number and self._may_return(deadline_s):
            return self._return(newest_s, deadline_s, step)
        if self.words.endswith(NO_MORE) and len(window) == STEADY_FRAMES and self._fits(deadline_s):
            self.words = self._say(newest_s, deadline_s, self.level.words) if self._number else ""
            return True
        return False

    def _per_frame(self) -> float:
        """How many steps there are for one frame of the busiest camera, those that are skipped included."""
        if self.level.takes_every == 1:
            return 1.0
        taken = Counter(camera for cameras in self._cameras for camera in cameras)
        return len(self._cameras) / max(taken.values()) / self.level.takes_every

    def _degrade(self, newest_s: float, deadline_s: float, step: int, *, may_skip: bool) -> bool:
        following = self._number + 1
        if following == len(self._levels) or not self._helps(self._levels[following], may_skip=may_skip):
            if self.words.endswith(NO_MORE):
                return False
            self.words = self._say(newest_s, deadline_s, f"{self.level.words}; {NO_MORE}" if self._number else NO_MORE)
            return True
        was_mistake = self._has_returned and self._frames <= FAILED_WITHIN_FRAMES
        self._patience[following] = min(PATIENCE_GROWS * self._patience[following], MOST_PATIENCE) if was_mistake else 1
        words = self._say(newest_s, deadline_s, f"{self._levels[following].words} since step {step}")
        before_s = {frames: _newest_s(window) for frames, window in self._enough().items()}
        self._change(following, words)
        self._before_s, self._has_returned = before_s, False
        return True

    def _helps(self, level: Level, *, may_skip: bool) -> bool:
        if level.takes_every == 1:
            return True
        is_busy = self.level.takes_every > 1 or 2 * sum(self._waited) > len(self._waited)
        return may_skip and is_busy

    def _may_return(self, deadline_s: float) -> bool:
        patience = self._patience[self._number]
        if self._frames < patience * RETURN_AFTER_FRAMES:
            return False
        return self._fits(deadline_s, self._saving(patience))

    def _fits(self, deadline_s: float, times: float = 1.0) -> bool:
        """Whether so many times what steps take is on time with a margin: the upper quartile, whatever they hold."""
        steady_s = max(_upper_quartile_s(window) for window in self._enough().values())
        return steady_s * self._per_frame() * times <= MARGIN * deadline_s

    def _enough(self) -> dict[int, deque[tuple[int, float]]]:
        """The windows that say something."""
        return {frames: window for frames, window in self._windows.items() if len(window) >= LATE_FRAMES}

    def _saving(self, patience: int) -> float:
        every, before = self.level.takes_every, self._levels[self._number - 1].takes_every
        if every != before:
            return every / before  # that is known
        age = self._frames / (SAVING_HALF_LIFE_FRAMES * patience)
        return 1.0 + (self._savings[self._number] - 1.0) * 0.5**age

    def _return(self, newest_s: float, deadline_s: float, step: int) -> bool:
        words = ""
        if self._number > 1:
            left_out = f"{self._levels[self._number - 1].words} since step {step}"
            words = self._say(newest_s, deadline_s, left_out)
        self._change(self._number - 1, words)
        self._has_returned = True
        return True

    def _no_deadline(self) -> bool:
        had = bool(self.words)
        if self._number or had:
            self._change(0, "")
        self._clear()
        self._has_returned, self._before_s = False, {}
        return had

    def _change(self, number: int, words: str) -> None:
        self._number, self.words = number, words
        self._before_s = {}
        self._clear()
        self._ignored, self._frames = SETTLING_FRAMES, 0

    def _clear(self) -> None:
        self._windows.clear()
        self._waited.clear()
        self._cameras.clear()

    def _say(self, took_s: float, deadline_s: float, what: str) -> str:
        return f"frames take {1e3 * took_s:.0f} ms, {self._parameter} is {1e3 * deadline_s:g}: {what}"


def _newest_s(window: Sequence[tuple[int, float]]) -> float:
    return statistics.median(step_s for _, step_s in list(window)[-LATE_FRAMES:])


def _upper_quartile_s(window: Sequence[tuple[int, float]]) -> float:
    return sorted(step_s for _, step_s in window)[3 * len(window) // 4]
