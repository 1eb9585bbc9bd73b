# SPDX-License-Identifier: Apache-2.0
"""Which single objects the union of a goal consists of, frame after frame. Decisions only: numpy in, no tensors.

The union tells how many things there are and where; it is one mask, so it knows no identities. Each instance has a
memory of its own, which knows what it is, but takes look-alikes for it: while it is hidden, it finds its twin. Both
together tell more: pixels that two memories claim belong to the one that was there before, and a part of the union that
no memory claims is either an instance whose memory is at its twin or, seen apart for long enough, a new one.

All masks of one goal have one size, any, the same in each frame.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np
from jaxtyping import Bool

Mask = Bool[np.ndarray, "h w"]

LEAST_AREA = 0.0005  # of the picture, and
LEAST_SHARE = 0.08  # of the largest part of the union: less is a speck
COVERED = 0.25  # of a part of the union, or twice that of the instance: the part is that instance's
OWN_SHARE = 0.3  # of an instance's mask that has to be left when others' pixels are taken off
SAME_THING = 0.7  # IoU of what two memories see
SAME_AREA = 0.5  # ratio of two areas, for a part to be the same one as in the frame before
WITHIN = 0.3  # of an instance's mask that has to be in the union
SPILT_STEPS = 3  # frames with another's pixels before an instance is shown its own anew
MISSED_STEPS = 2  # frames that a part may be away while it is not an instance yet
LONGER = 3  # times as many frames, where it is not sure that a part is a new instance
DUPLICATE_STEPS = 40  # frames in which two memories see the same, however often each is shown its own


@dataclass(eq=False)
class Changes:
    """What follows from one frame."""

    shown: dict[int, Mask | None]  # by number: what is its own of what its memory sees; None: nothing
    begin: list[Mask] = field(default_factory=list)  # parts of the union that are new instances
    move: dict[int, Mask] = field(default_factory=dict)  # by number: what to show it as all that is to be known of it
    purge: list[int] = field(default_factory=list)  # whose newest memories are of another one
    drop: list[int] = field(default_factory=list)  # the same thing as an older one
    unclaimed: int = 0  # parts of the union that are no instance (yet)


@dataclass
class _Known:
    own: Mask  # where it was when it was last shown
    is_current: bool = True  # which was in the frame before
    twin_steps: int = 0  # frames in which its memory has seen only what is another's
    same_steps: int = 0  # frames in which an older one's memory has seen the same
    spilt_steps: int = 0
    parts_steps: int = 0  # frames in which it was in several parts
    outside_steps: int = 0


@dataclass(eq=False)
class _Candidate:
    mask: Mask
    steps: int = 1
    missed: int = 0


class Instances:
    """The instances of one goal in one camera, by number; a lower number is an older instance.

    Args:
        confirm_steps: frames in which a part has to be seen apart before it is an instance.
    """

    def __init__(self, confirm_steps: int) -> None:
        self.confirm_steps = confirm_steps
        self._known: dict[int, _Known] = {}
        self._candidates: list[_Candidate] = []

    @property
    def numbers(self) -> list[int]:
        return sorted(self._known)

    def add(self, number: int, mask: Mask) -> None:
        self._known[number] = _Known(mask)

    def remove(self, number: int) -> None:
        del self._known[number]

    def retain(self, union: Mask) -> list[int]:
        """Another union takes over: forget the instances that are not in it, and tell them."""
        gone = []
        for number, known in self._known.items():
            if not known.is_current or _share(known.own & union, known.own) < WITHIN:
                gone.append(number)
        for number in gone:
            del self._known[number]
        self._candidates = []
        return gone

    def watch(self, union: Mask | None, seen: Mapping[int, Mask | None]) -> Changes:
        """Take one frame.

        Args:
            union: None while it is not sure: nothing begins then.
            seen: by number, what its memory sees of each instance; None: nothing.
        """
        masks = {number: mask for number in self.numbers if (mask := seen.get(number)) is not None and mask.any()}
        changes = Changes(self._without_others(masks))
        self._find_duplicates(masks, changes)
        for number, known in self._known.items():
            self._judge(number, known, masks.get(number), changes)
        parts = [] if union is None else components(union)
        if union is not None:
            self._judge_by_union(union, parts, changes)
            self._look_for_new(parts, changes)
        for number, own in changes.shown.items():
            known = self._known[number]
            known.is_current = own is not None
            if own is not None:
                known.own = own
        return changes

    def _without_others(self, masks: Mapping[int, Mask]) -> dict[int, Mask | None]:
        """Each mask without the pixels that are another's: of several claims, that of the nearest in the last frame."""
        shown: dict[int, Mask | None] = dict.fromkeys(self._known)
        shown.update(masks)
        if len(masks) < 2:
            return shown
        claims = np.stack(list(masks.values()))
        contested = claims.sum(axis=0) > 1
        if not contested.any():
            return shown
        # How far each is away; one that was not seen in the last frame is far away, the younger the farther.
        far = np.stack([self._distance_px(number, rank) for rank, number in enumerate(masks)])
        owner = np.where(claims, far, np.inf).argmin(axis=0)
        for rank, (number, mask) in enumerate(masks.items()):
            shown[number] = mask & ~(contested & (owner != rank))
        return shown

    def _distance_px(self, number: int, rank: int) -> np.ndarray:
        known = self._known[number]
        if not known.is_current:
            return np.full(known.own.shape, 1e6 + rank, np.float32)
        return cv2.distanceTransform((~known.own).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)

    def _find_duplicates(self, masks: Mapping[int, Mask], changes: Changes) -> None:
        """Two things that touch are one again for a memory now and then; one thing with two ids is so for ever."""
        same = set()
        current = [number for number in masks if self._known[number].is_current]
        for older, younger in itertools.combinations(current, 2):
            both = np.count_nonzero(masks[older] & masks[younger])
            if both and both >= SAME_THING * np.count_nonzero(masks[older] | masks[younger]):
                same.add(younger)
        for number in current:
            known = self._known[number]
            known.same_steps = known.same_steps + 1 if number in same else 0
            if known.same_steps >= DUPLICATE_STEPS:
                changes.drop.append(number)

    def _judge(self, number: int, known: _Known, seen: Mask | None, changes: Changes) -> None:
        """What one memory sees beside its own object."""
        left = changes.shown[number]
        if seen is None or left is None:
            known.spilt_steps = known.twin_steps = 0
            return
        share = _share(left, seen)
        if share < OWN_SHARE:
            known.twin_steps += 1
            changes.shown[number] = None
            if known.twin_steps % SPILT_STEPS == 0:
                changes.purge.append(number)
            return
        known.twin_steps = 0
        known.spilt_steps = known.spilt_steps + 1 if share < 1 - OWN_SHARE else 0
        if known.spilt_steps >= SPILT_STEPS:
            changes.move[number], known.spilt_steps = left, 0

    def _judge_by_union(self, union: Mask, parts: list[Mask], changes: Changes) -> None:
        is_any_astray = any(known.twin_steps for known in self._known.values())
        for number, known in self._known.items():
            own = changes.shown[number]
            if own is None:
                continue
            is_outside = _share(own & union, own) < WITHIN
            known.outside_steps = known.outside_steps + 1 if is_outside else 0
            if known.outside_steps > LONGER * self.confirm_steps:
                changes.shown[number] = None
                continue
            # Two things that touched when it began and are apart now; or one thing behind a bar, so do not hurry. But
            # where another is missing, it is likely to be the second part.
            own_parts = [part for part in parts if _share(part & own, part) >= 0.5 and _share(part & own, own) >= 0.2]
            known.parts_steps = known.parts_steps + 1 if len(own_parts) > 1 else 0
            if known.parts_steps >= (1 if is_any_astray else LONGER) * self.confirm_steps:
                changes.move[number] = changes.shown[number] = max(own_parts, key=np.count_nonzero) & own
                known.parts_steps = 0

    def _look_for_new(self, parts: list[Mask], changes: Changes) -> None:
        claims = [own for own in changes.shown.values() if own is not None]
        free = [
            part
            for part in parts
            if not any(_share(part & own, part) >= COVERED or _share(part & own, own) >= 2 * COVERED for own in claims)
        ]
        self._match(free)
        changes.unclaimed = len(free)
        # An instance whose memory is at its twin's is hidden, or it is a part that nobody claims. One whose memory
        # sees nothing may be about to see that part.
        astray = [n for n, known in self._known.items() if known.twin_steps and n not in changes.drop]
        is_any_hidden = any(own is None for own in changes.shown.values())
        claimed = np.logical_or.reduce(claims) if claims else None
        for candidate in list(self._candidates):
            own = candidate.mask if claimed is None else candidate.mask & ~claimed
            if candidate.missed or candidate.steps < self.confirm_steps or not own.any():
                continue
            if astray:
                number = min(astray, key=lambda n: _distance(self._known[n].own, candidate.mask))
                astray.remove(number)
                changes.move[number] = changes.shown[number] = own
                self._known[number].twin_steps = 0
                if number in changes.purge:
                    changes.purge.remove(number)
            elif not is_any_hidden or candidate.steps >= LONGER * self.confirm_steps:
                changes.begin.append(own)
            else:
                continue
            self._candidates.remove(candidate)

    def _match(self, free: list[Mask]) -> None:
        """Find the candidates of the last frame among the free parts of this one."""
        waiting, matched = list(self._candidates), []
        for part in sorted(free, key=np.count_nonzero, reverse=True):
            best = max(waiting, key=lambda c: np.count_nonzero(c.mask & part), default=None)
            if best is None or not (best.mask & part).any():
                matched.append(_Candidate(part))
                continue
            waiting.remove(best)
            area, before = np.count_nonzero(part), np.count_nonzero(best.mask)
            is_same = min(area, before) >= SAME_AREA * max(area, before)
            matched.append(_Candidate(part, best.steps + 1 if is_same else 1))
        for candidate in waiting:
            if candidate.missed < MISSED_STEPS:
                matched.append(_Candidate(candidate.mask, candidate.steps, candidate.missed + 1))
        self._candidates = matched


def components(union: Mask) -> list[Mask]:
    """The connected parts of a mask without specks, largest first. Corners connect; holes stay holes."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(union.view(np.uint8), connectivity=8)
    areas = stats[1:count, cv2.CC_STAT_AREA]
    if not len(areas):
        return []
    least = max(LEAST_AREA * union.size, LEAST_SHARE * int(areas.max()), 2)
    return [labels == 1 + k for k in np.argsort(-areas, kind="stable") if areas[k] >= least]


def _share(part: Mask, whole: Mask) -> float:
    area = np.count_nonzero(whole)
    return np.count_nonzero(part) / area if area else 0.0


def _distance(one: Mask, other: Mask) -> float:
    return float(np.linalg.norm(np.argwhere(one).mean(axis=0) - np.argwhere(other).mean(axis=0)))
