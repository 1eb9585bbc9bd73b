# SPDX-License-Identifier: Apache-2.0
"""object_id (the user's name) <-> slot (row of the tensors) <-> instance_id (value in the mask image)."""

from dataclasses import dataclass

from virst_engine.errors import BadGoal

MAX_INSTANCE_ID = 254  # 0 is background, 255 is reserved


@dataclass(frozen=True)
class Assignment:
    object_id: str
    slot: int
    instance_id: int


class ObjectRegistry:
    """Hands out slots, lowest first, and instance ids, round robin.

    Round robin, because a subscriber that still holds an old mask must not take its pixels for the new object.
    """

    def __init__(self, slots: int) -> None:
        if not 1 <= slots <= MAX_INSTANCE_ID:
            raise ValueError(f"slots must be 1..{MAX_INSTANCE_ID}, got {slots}")
        self._slots = slots
        self._alive: dict[str, Assignment] = {}
        self._last_instance_id = 0

    def __len__(self) -> int:
        return len(self._alive)

    def assign(self, object_id: str) -> Assignment:
        """Raises BadGoal when the id is taken or every slot is."""
        if object_id in self._alive:
            raise BadGoal(f"object id {object_id!r} is in use; choose another or clear its goal first")
        if len(self._alive) >= self._slots:
            raise BadGoal(f"all {self._slots} objects are in use; clear a goal or raise tracking.max_objects")
        taken_slots = {a.slot for a in self._alive.values()}
        taken_ids = {a.instance_id for a in self._alive.values()}
        slot = next(s for s in range(self._slots) if s not in taken_slots)
        instance_id = self._last_instance_id
        while True:
            instance_id = instance_id % MAX_INSTANCE_ID + 1
            if instance_id not in taken_ids:
                break
        self._last_instance_id = instance_id
        assignment = Assignment(object_id, slot, instance_id)
        self._alive[object_id] = assignment
        return assignment

    def release(self, object_id: str) -> Assignment:
        """What the object had. KeyError when there is no such object: that is our own mistake."""
        return self._alive.pop(object_id)
