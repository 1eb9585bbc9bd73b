# SPDX-License-Identifier: Apache-2.0
"""What must hold of a segmenter's answers and messages, whatever is asked of it. No ROS in it.

Requests and messages cross on their way, so a goal has a time in which it may be there or not. Three facts need no
guess, as all times are of one clock, that of the images' stamps, and all are taken in one process:

- An image that was stamped after a goal's answer is processed with that goal.
- A message that was received before the goal's end was asked for was made before it.
- An image that was stamped after the end's answer is processed without that goal.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

IMAGES_KEPT = 4096  # per camera: stamps that were sent, newest first to be asked for
FRAMES_KEPT = 64  # per camera: masks and `objects` that wait for each other
KEPT_AFTER_END_NS = 60_000_000_000  # of a goal that has ended
DETAILS_KEPT = 50
SETTLED_AFTER_NS = 5_000_000_000  # the answer to what may change a goal's instances
REPLACED_WITHIN_NS = 10_000_000_000  # one that has gone for longer is not what a new one was

GOALS_LOST = "goals_lost"
GOALS_NOT_SET = "goals_not_set"
IDS_REUSED = "ids_reused"
FOREIGN_PIXELS = "foreign_pixels"
UNKNOWN_STAMPS = "unknown_stamps"
STAMPS_NOT_INCREASING = "stamps_not_increasing"
EXCEPTIONS = "exceptions"
KINDS = (
    GOALS_LOST,
    GOALS_NOT_SET,
    IDS_REUSED,
    FOREIGN_PIXELS,
    UNKNOWN_STAMPS,
    STAMPS_NOT_INCREASING,
    EXCEPTIONS,
)


@dataclass(frozen=True)
class Seen:
    """One object of an `objects` message, or of a goal of a list."""

    goal_id: str
    object_id: str
    instance_id: int
    is_tracked: bool = False  # its pixels may be in the mask
    part_of: str = ""  # of an instance: the object id of its union


@dataclass
class Life:
    """One goal from its request to its end. Times are None until they are known.

    Args:
        object_id: the name that was asked for; empty: the segmenter chooses one.
        cameras: those that have to show it.
        is_split: it may own instances, which come and go while it lives.
    """

    object_id: str
    cameras: Collection[str]
    asked_ns: int
    is_split: bool = False
    goal_id: str = ""
    set_ns: int | None = None  # its answer was here
    end_asked_ns: int | None = None
    ended_ns: int | None = None  # that answer was here
    # By object id, as first seen. An instance that has gone keeps its name, but another may get its value.
    instance_ids: dict[str, int] = field(default_factory=dict)
    removed_ns: dict[str, int] = field(default_factory=dict)  # instances that nobody wants any more
    settled_ns: int = 0  # before, its instances may go for a reason
    met: set[str] = field(default_factory=set)  # all instances so far
    here: dict[str, set[str]] = field(default_factory=dict)  # by camera: instances in the newest message
    gone_ns: dict[str, dict[str, int]] = field(default_factory=dict)  # by camera: instance -> stamp without it
    is_lost: bool = False

    def owns(self, seen: Seen) -> bool:
        if self.goal_id:
            return seen.goal_id == self.goal_id
        return seen.object_id == self.object_id if self.object_id else self.set_ns is None  # not named yet: may be any

    def must_be_seen(self, stamp_ns: int, received_ns: int) -> bool:
        """In what was made of an image of that stamp, and received then."""
        is_set = self.set_ns is not None and stamp_ns > self.set_ns
        return is_set and (self.end_asked_ns is None or received_ns < self.end_asked_ns)

    def may_be_seen(self, stamp_ns: int) -> bool:
        return self.ended_ns is None or stamp_ns <= self.ended_ns


class Checker:
    """Collects what was sent, asked and received, from any thread, and counts what should not be."""

    def __init__(self, cameras: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self.cameras = tuple(cameras)
        self.violations: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.details: list[str] = []
        self.exceptions_by_kind: Counter[str] = Counter()
        self.images: Counter[str] = Counter()
        self.masks: Counter[str] = Counter()
        self.objects: Counter[str] = Counter()
        self.masks_compared = 0
        self.goals_set = self.goals_cleared = self.instances_found = self.instance_ids_lost = 0
        self._settled_ns = 0
        self._lives: list[Life] = []
        self._sent: dict[str, OrderedDict[int, None]] = {camera: OrderedDict() for camera in cameras}
        self._newest_ns: dict[tuple[str, str], int] = {}  # by topic and camera
        self._values: dict[str, OrderedDict[int, frozenset[int]]] = {camera: OrderedDict() for camera in cameras}
        self._tracked: dict[str, OrderedDict[int, frozenset[int]]] = {camera: OrderedDict() for camera in cameras}

    # Goals

    def lives(self) -> list[Life]:
        """Those that have not ended."""
        with self._lock:
            return [life for life in self._lives if life.ended_ns is None]

    def ask(
        self, now_ns: int, object_id: str = "", cameras: Collection[str] | None = None, *, is_split: bool = False
    ) -> Life:
        """A goal is about to be asked for. Without cameras: it is for all of them."""
        life = Life(object_id, self.cameras if cameras is None else cameras, now_ns, is_split)
        with self._lock:
            self._lives.append(life)
        return life

    def was_set(self, life: Life, now_ns: int, goal_id: str = "", object_id: str = "") -> None:
        """It was answered with success. Its goal id may stay unknown, as add_objects tells none."""
        with self._lock:
            life.goal_id, life.object_id, life.set_ns = goal_id, object_id or life.object_id, now_ns
            self.goals_set += 1

    def was_refused(self, life: Life) -> None:
        with self._lock:
            self._lives.remove(life)

    def ask_end(self, lives: Iterable[Life], now_ns: int) -> None:
        """The end of these goals is about to be asked for."""
        with self._lock:
            for life in lives:
                life.end_asked_ns = now_ns

    def has_ended(self, lives: Iterable[Life], now_ns: int) -> None:
        """That was answered with success. Also for goals that have ended without being asked to."""
        with self._lock:
            for life in lives:
                life.end_asked_ns = now_ns if life.end_asked_ns is None else life.end_asked_ns
                life.ended_ns = now_ns
                self.goals_cleared += life.set_ns is not None
            self._lives = [
                life for life in self._lives if life.ended_ns is None or now_ns - life.ended_ns < KEPT_AFTER_END_NS
            ]

    def instance_removed(self, goal_id: str, object_id: str, now_ns: int) -> None:
        """One instance was ended alone, as was answered now."""
        with self._lock:
            for life in self._lives:
                if life.goal_id == goal_id:
                    life.removed_ns[object_id] = now_ns

    def is_disturbed(self, now_ns: int, lives: Iterable[Life] | None = None) -> None:
        """Something that may change the instances of these goals, or of all, is about to be asked for or was answered.

        Another prompt of the goal's object, a reset, a pause. It has an effect for some time.
        """
        with self._lock:
            for life in self._lives if lives is None else lives:
                life.settled_ns = max(life.settled_ns, now_ns + SETTLED_AFTER_NS)

    def listed(self, goals: Sequence[Seen], asked_ns: int, answered_ns: int) -> None:
        """What list_goals says, asked for and answered then."""
        with self._lock:
            self._check_distinct(goals, "list_goals")
            for life in self._lives:
                is_set = life.set_ns is not None and life.set_ns < asked_ns
                if is_set and (life.end_asked_ns is None or life.end_asked_ns > answered_ns):
                    self._expect(life, goals, "list_goals")
            # A goal that has ended before this was asked for may not be listed.
            self._check_wanted(goals, asked_ns, "list_goals")

    # Frames

    def image_sent(self, camera: str, stamp_ns: int) -> None:
        """About to be."""
        with self._lock:
            self.images[camera] += 1
            sent = self._sent[camera]
            sent[stamp_ns] = None
            while len(sent) > IMAGES_KEPT:
                sent.popitem(last=False)

    def objects_came(self, camera: str, stamp_ns: int, objects: Sequence[Seen], received_ns: int) -> None:
        where = f"objects of {camera} at {stamp_ns}"
        with self._lock:
            self.objects[camera] += 1
            self._check_stamp("objects", camera, stamp_ns)
            self._check_distinct(objects, where)
            for life in self._lives:
                if camera in life.cameras and life.must_be_seen(stamp_ns, received_ns):
                    self._expect(life, objects, where)
            self._check_wanted(objects, stamp_ns, where, camera)
            self._check_instances(objects, stamp_ns, received_ns, where)
            for life in self._lives:
                if life.is_split and camera in life.cameras and life.must_be_seen(stamp_ns, received_ns):
                    self._count_lost_ids(life, camera, stamp_ns, objects)
            tracked = frozenset(seen.instance_id for seen in objects if seen.is_tracked)
            _keep(self._tracked[camera], stamp_ns, tracked)
            self._compare(camera, stamp_ns)

    def mask_came(self, camera: str, stamp_ns: int, values: Iterable[int]) -> None:
        """`values`: those of the mask's pixels, each once."""
        with self._lock:
            self.masks[camera] += 1
            self._check_stamp("mask", camera, stamp_ns)
            _keep(self._values[camera], stamp_ns, frozenset(values) - {0})
            self._compare(camera, stamp_ns)

    # Failures

    def failed(self, kind: str, what: str) -> None:
        """An exception: a failure in a log, an ERROR in diagnostics, a request that was answered wrongly or not."""
        with self._lock:
            self.exceptions_by_kind[kind] += 1
            self._violated(EXCEPTIONS, f"{kind}: {what}")

    def counts(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self.violations)

    # Under the lock

    def _violated(self, kind: str, what: str) -> None:
        self.violations[kind] += 1
        if len(self.details) < DETAILS_KEPT:
            self.details.append(f"{kind}: {what[:500]}")

    def _expect(self, life: Life, seen: Sequence[Seen], where: str) -> None:
        if not life.is_lost and not any(life.owns(each) for each in seen):
            life.is_lost = True  # one that is lost is one, not one per frame
            there = ", ".join(f"{each.goal_id}/{each.object_id}" for each in seen) or "none"
            name = f"{life.goal_id or 'goal'}/{life.object_id}"
            self._violated(GOALS_LOST, f"{name}, set at {life.set_ns}, is not in {where}; there: {there}")

    def _check_wanted(self, seen: Sequence[Seen], stamp_ns: int, where: str, camera: str | None = None) -> None:
        may_be = [
            life for life in self._lives if life.may_be_seen(stamp_ns) and (camera is None or camera in life.cameras)
        ]
        for each in seen:
            owners = [life for life in may_be if life.owns(each)]
            if not owners:
                self._violated(GOALS_NOT_SET, f"{each.goal_id}/{each.object_id} in {where} is not set there")
            elif any(stamp_ns > life.removed_ns.get(each.object_id, stamp_ns) for life in owners):
                self._violated(GOALS_NOT_SET, f"the instance {each.object_id} in {where} was removed")
            elif each.part_of and not any(life.is_split for life in owners):
                self._violated(GOALS_NOT_SET, f"{each.object_id} in {where} is an instance of a goal that is not split")

    def _check_distinct(self, seen: Sequence[Seen], where: str) -> None:
        for name in ("object_id", "instance_id"):
            values = [getattr(each, name) for each in seen]
            for value, times in Counter(values).items():
                if times > 1:
                    self._violated(IDS_REUSED, f"{name} {value!r} is there {times} times in {where}")

    def _check_instances(self, seen: Sequence[Seen], stamp_ns: int, received_ns: int, where: str) -> None:
        for each in seen:
            # Named ones first: until its answer is here, one without a name could be anybody.
            owners = [life for life in self._lives if life.owns(each) and life.may_be_seen(stamp_ns)]
            owner = next((life for life in owners if life.goal_id or life.object_id), None)
            if owner is not None:
                self.instances_found += bool(each.part_of) and each.object_id not in owner.instance_ids
                known = owner.instance_ids.setdefault(each.object_id, each.instance_id)
                if known != each.instance_id:
                    owner.instance_ids[each.object_id] = each.instance_id
                    self._violated(
                        IDS_REUSED, f"{each.object_id!r} changed from {known} to {each.instance_id} in {where}"
                    )
            for life in self._lives:
                is_alive = life.set_ns is not None and (life.end_asked_ns is None or received_ns < life.end_asked_ns)
                if not is_alive or life.owns(each):
                    continue
                if each.object_id in life.instance_ids or each.instance_id == life.instance_ids.get(life.object_id):
                    self._violated(
                        IDS_REUSED,
                        f"{each.goal_id}/{each.object_id} ({each.instance_id}) in {where} has an id of "
                        f"{life.goal_id}/{life.object_id} ({life.instance_ids}), which is alive",
                    )

    def _count_lost_ids(self, life: Life, camera: str, stamp_ns: int, seen: Sequence[Seen]) -> None:
        """Of instances that are there no more, those that a new one has taken the place of, as far as can be told."""
        here = {each.object_id for each in seen if each.part_of and life.owns(each)}
        new, left = here - life.met, life.here.get(camera, set()) - here
        life.here[camera] = here
        life.met |= here
        gone_ns = life.gone_ns.setdefault(camera, {})
        if stamp_ns <= life.settled_ns:
            gone_ns.clear()
            return
        gone_ns.update(dict.fromkeys(left, stamp_ns))
        for name, since_ns in list(gone_ns.items()):
            if name in here or name in life.removed_ns or stamp_ns - since_ns > REPLACED_WITHIN_NS:
                del gone_ns[name]
        for name in list(gone_ns)[: len(new)]:
            del gone_ns[name]
            self.instance_ids_lost += 1

    def _check_stamp(self, topic: str, camera: str, stamp_ns: int) -> None:
        if stamp_ns not in self._sent[camera]:
            self._violated(UNKNOWN_STAMPS, f"{topic} of {camera} has {stamp_ns}, which no image had")
        newest_ns = self._newest_ns.get((topic, camera), 0)
        if stamp_ns <= newest_ns:
            self._violated(STAMPS_NOT_INCREASING, f"{topic} of {camera} went from {newest_ns} to {stamp_ns}")
        self._newest_ns[topic, camera] = max(stamp_ns, newest_ns)

    def _compare(self, camera: str, stamp_ns: int) -> None:
        values, tracked = self._values[camera].get(stamp_ns), self._tracked[camera].get(stamp_ns)
        if values is None or tracked is None:
            return
        self.masks_compared += 1
        if not values <= tracked:
            self._violated(
                FOREIGN_PIXELS,
                f"the mask of {camera} at {stamp_ns} has {sorted(values - tracked)}, tracked are {sorted(tracked)}",
            )


def _keep(kept: "OrderedDict[int, frozenset[int]]", stamp_ns: int, value: frozenset[int]) -> None:
    kept[stamp_ns] = value
    while len(kept) > FRAMES_KEPT:
        kept.popitem(last=False)
