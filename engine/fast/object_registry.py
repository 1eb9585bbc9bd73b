# SPDX-License-Identifier: Apache-2.0
"""object_id (the user's name) <-> slot (row of a camera's tensors) <-> instance_id (value in the mask image)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from virst_engine.errors import BadGoal

MAX_INSTANCE_ID = 254  # 0 is background, 255 is reserved
ONLY_CAMERA = ""


@dataclass(frozen=True)
class Assignment:
    object_id: str
    instance_id: int
    slots: dict[str, int]  # by camera, of those that look for it
    part_of: str = ""  # object id of the union that it is an instance of

    @property
    def slot(self) -> int:
        """Where there is one camera."""
        return next(iter(self.slots.values()))


class ObjectRegistry:
    """Hands out the slots of each camera, and ids that are unique in all of them.

    Instance ids go round, because a subscriber that still holds an old mask must not take its pixels for the new
    object. Objects that were asked for get the lowest free slots, instances that were found the highest.

    A slot that is free may still hold what its last object left. An object that is asked for may have it, as the
    camera's stream takes notice of it after it has forgotten the last one. An instance may not: it is there at once.
    """

    def __init__(self, slots: int, cameras: Sequence[str] = (ONLY_CAMERA,)) -> None:
        if not 1 <= slots <= MAX_INSTANCE_ID:
            raise ValueError(f"slots must be 1..{MAX_INSTANCE_ID}, got {slots}")
        self._slots, self._cameras = slots, tuple(cameras)
        self._alive: dict[str, Assignment] = {}
        self._found: dict[str, int] = {}  # object id of a union -> the last number of an instance of it
        self._hidden: set[str] = set()
        self._leaving: Counter[tuple[str, int]] = Counter()  # camera and slot -> objects that it has to forget
        self._last_instance_id = 0

    def __len__(self) -> int:
        return len(self._alive)

    def assign(self, object_id: str, cameras: Sequence[str] | None = None) -> Assignment:
        """What an object that is asked for gets in these cameras; None: in all.

        Raises BadGoal when the id is taken or every slot of one of them is.
        """
        if object_id in self._alive:
            raise BadGoal(f"object id {object_id!r} is in use; choose another or clear its goal first")
        slots = {}
        for camera in self._cameras if cameras is None else cameras:
            free = self._free(camera)
            if not free:
                raise BadGoal(self._why_full(camera))
            slots[camera] = free[0]
        instance_id = self._next_instance_id()
        if instance_id is None:
            raise BadGoal(f"all {MAX_INSTANCE_ID} values of the mask image are in use; clear a goal")
        return self._keep(Assignment(object_id, instance_id, slots))

    def assign_instance(self, union_id: str, camera: str) -> Assignment | None:
        """What one more instance of a union gets in the camera that found it; None when nothing is free.

        Its object id is the union's with a number, which no other instance of this union had or will have.
        """
        free = [slot for slot in self._free(camera) if not self._leaving[camera, slot]]
        instance_id = self._next_instance_id()
        if not free or instance_id is None:
            return None
        number = self._found.get(union_id, 0) + 1
        while f"{union_id}.{number}" in self._alive:  # a user's own name
            number += 1
        self._found[union_id] = number
        return self._keep(Assignment(f"{union_id}.{number}", instance_id, {camera: free[-1]}, part_of=union_id))

    def release(self, object_id: str) -> Assignment:
        """What the object had. KeyError when there is no such object: that is our own mistake."""
        self._found.pop(object_id, None)
        self._hidden.discard(object_id)
        return self._alive.pop(object_id)

    def leave(self, camera: str, slots: Iterable[int]) -> None:
        """Released slots of objects that the camera's stream still has to forget; it says so with `has_left`."""
        self._leaving.update((camera, slot) for slot in slots)

    def has_left(self, camera: str, slots: Iterable[int]) -> None:
        """They are forgotten: as often as they were to `leave`, and instances may have them again."""
        for slot in slots:
            self._leaving[camera, slot] -= 1
        self._leaving = +self._leaving

    def hide(self, object_id: str) -> None:
        """An instance that the user does not want: it keeps what it has, but nobody else is told of it."""
        self._hidden.add(object_id)

    def instances(self, union_id: str, *, hidden: bool = False) -> list[Assignment]:
        """Of one union in all cameras, in the order in which they were found; with `hidden`, those as well."""
        return [
            each
            for each in self._alive.values()
            if each.part_of == union_id and (hidden or each.object_id not in self._hidden)
        ]

    def find(self, object_id: str, *, hidden: bool = False) -> Assignment | None:
        return self._alive.get(object_id) if hidden or object_id not in self._hidden else None

    def _free(self, camera: str) -> list[int]:
        taken = {each.slots[camera] for each in self._alive.values() if camera in each.slots}
        return [slot for slot in range(self._slots) if slot not in taken]

    def _next_instance_id(self) -> int | None:
        taken = {each.instance_id for each in self._alive.values()}
        after = (self._last_instance_id + k for k in range(MAX_INSTANCE_ID))
        return next((i for each in after if (i := each % MAX_INSTANCE_ID + 1) not in taken), None)

    def _keep(self, assignment: Assignment) -> Assignment:
        self._last_instance_id = assignment.instance_id
        self._alive[assignment.object_id] = assignment
        return assignment

    def _why_full(self, camera: str) -> str:
        found = sum(bool(each.part_of) for each in self._alive.values() if camera in each.slots)
        if not found:
            return f"all {self._slots} objects are in use; clear a goal or raise tracking.max_objects"
        return (
            f"all {self._slots} objects are in use, {found} of them by instances of goals that are split (removed ones "
            "count until their goal ends): clear a goal or raise tracking.max_objects"
        )
