# SPDX-License-Identifier: Apache-2.0
"""The single objects that a goal is split into, in the stream of one camera: joins their policy and the tracker."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool

from virst_engine.config import TrackingParameters
from virst_engine.errors import VirstError
from virst_engine.fast.instances import Instances, Mask
from virst_engine.fast.object_registry import Assignment, ObjectRegistry
from virst_engine.fast.postprocess import empty_mask, mask_at_size
from virst_engine.fast.tracker import Sighting, Tracker
from virst_engine.types import ClickPrompt, Goal, MaskPrompt, ObjectResult, ObjectState

logger = logging.getLogger(__name__)

FINEST_SIDE = 256  # pixels of the square in which parts are told apart; masks are four times coarser than their input
REPLACED_AFTER = 5  # times tracking.instance_steps that an instance has been lost before another may have its slot


@dataclass
class _Instance:
    assignment: Assignment
    slot: int
    anchor_ns: int
    state: ObjectState = ObjectState.TRACKING
    absent_steps: int = 0
    is_seen: bool = True  # in the newest frame, and it is its own
    taken: Mask | None = None  # pixels of its memory's mask that are another's
    is_removed: bool = False  # by the user; it is tracked on, or the part would become an instance again
    problem: str = ""


class InstanceTracks:
    """Owned by the thread that owns the models.

    Args:
        camera: as the registry names it.
        lock: the session's, which guards the registry.
        image_size: side of the model's square input.
    """

    def __init__(
        self,
        goal: Goal,
        tracker: Tracker,
        registry: ObjectRegistry,
        lock: threading.Lock,
        tracking: TrackingParameters,
        *,
        camera: str,
        image_size: int,
    ) -> None:
        self._goal, self._tracker, self._camera = goal, tracker, camera
        self._registry, self._lock = registry, lock
        self._side = min(image_size, FINEST_SIDE)
        self._policy = Instances(tracking.instance_steps)
        self._instances: dict[int, _Instance] = {}  # by number, in the order in which they were found
        self._lost_after_steps = tracking.lost_after_steps
        self._is_full = False  # parts were left over because no slot was free
        self._is_other_union = False

    def reconfigure(self, tracking: TrackingParameters) -> None:
        """Take the live parameters of these."""
        self._policy.confirm_steps, self._lost_after_steps = tracking.instance_steps, tracking.lost_after_steps

    @property
    def message(self) -> str:
        """For the union: what is wrong with its instances."""
        if not self._is_full:
            return ""
        return (
            "there are more instances than free objects, so not all of them are told apart: raise tracking.max_objects"
        )

    def states(self) -> dict[str, ObjectState]:
        """By object id."""
        return {each.assignment.object_id: each.state for each in self._instances.values() if not each.is_removed}

    def union_was_replaced(self) -> None:
        """It shows another thing from now on: instances that are not in it go."""
        self._is_other_union = True

    def clear(self) -> None:
        """Know none of them any more. What is in their slots, and the registry, are seen to by who clears the goal."""
        for number in self._policy.numbers:
            self._policy.remove(number)
        self._instances.clear()
        self._is_full = self._is_other_union = False

    def release(self) -> None:
        """Forget all of them, and give their ids and slots back."""
        for number in list(self._instances):
            self._drop(number)
        self.clear()

    def remove(self, object_id: str) -> None:
        """Show an instance no more."""
        for each in self._instances.values():
            if each.assignment.object_id == object_id:
                each.is_removed = True

    def prompt(self, object_id: str, step: int, prompt: ClickPrompt | MaskPrompt) -> None:
        """A user's prompt shows an instance once more."""
        for each in self._instances.values():
            if each.assignment.object_id != object_id:
                continue
            try:
                sighting = self._tracker.prompt(each.slot, step, prompt)
            except VirstError as error:  # its frame was evicted since the prompt was accepted
                each.problem = str(error)
                return
            if not sighting.is_present and isinstance(prompt, ClickPrompt):
                each.problem = "nothing was found where it was pointed out; point at its middle, or give a box"
                return
            each.problem, each.anchor_ns = "", self._tracker.ring.stamp_ns(step) or each.anchor_ns

    def watch(self, union: Sighting | None, step: int, stamp_ns: int, height: int, width: int) -> None:
        """Look at one frame.

        Args:
            union: None while it is not sure.
            height, width: of the camera's image.
        """
        union_mask = None if union is None else self._small(union)
        if union_mask is not None and self._is_other_union:
            self._is_other_union = False
            for number in self._policy.retain(union_mask):
                self._drop(number)
        sightings = {number: self._tracker.sighting(each.slot) for number, each in self._instances.items()}
        seen = {
            number: self._small(sighting) if sighting is not None and sighting.is_present else None
            for number, sighting in sightings.items()
        }
        changes = self._policy.watch(union_mask, seen)
        for number in changes.purge:
            self._tracker.memory.forget_recent(self._instances[number].slot)
        for number, mask in changes.move.items():
            self._show(self._instances[number], step, stamp_ns, mask, height, width)
        for number, each in self._instances.items():
            self._note(each, seen[number], changes.shown[number], is_moved=number in changes.move)
        for number in changes.drop:
            self._policy.remove(number)
            self._drop(number)
        self._begin(changes.begin, step, stamp_ns, height, width)
        if changes.unclaimed == 0:
            self._is_full = False

    def results(self, union: ObjectResult, stamp_ns: int, height: int, width: int) -> list[ObjectResult]:
        """What is known of each of them in the frame that was watched last."""
        return [self._result(each, union, stamp_ns, height, width) for each in self._shown()]

    def _shown(self) -> Sequence[_Instance]:
        return [each for each in self._instances.values() if not each.is_removed]

    def _small(self, sighting: Sighting) -> Mask:
        return mask_at_size(sighting.host_logits, self._side, self._side)

    @staticmethod
    def _note_absence(each: _Instance, lost_after_steps: int) -> None:
        each.absent_steps += 1
        if each.absent_steps >= lost_after_steps:
            each.state = ObjectState.LOST

    def _note(self, each: _Instance, seen: Mask | None, shown: Mask | None, *, is_moved: bool) -> None:
        each.is_seen, each.taken = shown is not None, None
        if shown is None:
            self._note_absence(each, self._lost_after_steps)
            return
        each.state, each.absent_steps = ObjectState.TRACKING, 0
        if not is_moved and seen is not None:
            taken = seen & ~shown
            each.taken = taken if taken.any() else None

    def _show(self, each: _Instance, step: int, stamp_ns: int, mask: Mask, height: int, width: int) -> None:
        """Let this mask be all that is known of the instance."""
        self._tracker.forget(each.slot)
        self._tracker.prompt(each.slot, step, MaskPrompt(_at_size(mask, height, width)))
        each.anchor_ns = stamp_ns

    def _begin(self, masks: Sequence[Mask], step: int, stamp_ns: int, height: int, width: int) -> None:
        for mask in masks:
            if len(self._shown()) >= self._goal.max_instances and not self._make_room():
                return
            assignment = self._assign()
            if assignment is None and self._make_room():
                assignment = self._assign()
            if assignment is None:
                self._is_full = True
                return
            number = int(assignment.object_id.rpartition(".")[2])
            each = _Instance(assignment, assignment.slots[self._camera], stamp_ns)
            self._instances[number] = each
            self._policy.add(number, mask)
            self._show(each, step, stamp_ns, mask, height, width)
            logger.info("goal %s: instance %s", self._goal.goal_id, assignment.object_id)

    def _assign(self) -> Assignment | None:
        with self._lock:
            union = self._registry.find(self._goal.object_id)
            if union is None or union.instance_id != self._goal.instance_id:  # cleared a moment ago
                return None
            return self._registry.assign_instance(self._goal.object_id, self._camera)

    def _make_room(self) -> bool:
        """Give up the instance that has been lost for longest, if any has been for long.

        Not one that was removed: it would be a new one when it comes back.
        """
        least = REPLACED_AFTER * self._policy.confirm_steps
        shown = [number for number, each in self._instances.items() if not each.is_removed]
        number = max(shown, key=lambda n: self._instances[n].absent_steps, default=None)
        if number is None or self._instances[number].absent_steps < least:
            return False
        self._policy.remove(number)
        self._drop(number)
        return True

    def _drop(self, number: int) -> None:
        each = self._instances.pop(number)
        self._tracker.forget(each.slot)
        with self._lock:
            self._release(each)

    def _release(self, each: _Instance) -> None:
        """Under the lock."""
        held = self._registry.find(each.assignment.object_id, hidden=True)
        if held is not None and held == each.assignment:  # else its goal was cleared a moment ago
            self._registry.release(held.object_id)

    def _result(self, each: _Instance, union: ObjectResult, stamp_ns: int, height: int, width: int) -> ObjectResult:
        sighting = self._tracker.sighting(each.slot)
        mask, score, message = empty_mask(height, width), 0.0, each.problem
        if each.is_seen and sighting is not None:
            mask = mask_at_size(sighting.host_logits, height, width)
            if each.taken is not None:
                mask &= ~_at_size(each.taken, height, width)
            score = min(max(sighting.iou, 0.0), 1.0) * sighting.presence
        elif each.state is ObjectState.LOST and not message:
            message = "not visible at the moment; it is found again when it comes back"
        return replace(
            union,
            object_id=each.assignment.object_id,
            instance_id=each.assignment.instance_id,
            state=each.state,
            mask=mask,
            score=score,
            prompt_age_s=(stamp_ns - each.anchor_ns) / 1e9,
            message=message,
            part_of=union.object_id,
        )


def _at_size(mask: Mask, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    return cv2.resize(mask.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).view(np.bool_)
