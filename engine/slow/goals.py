# SPDX-License-Identifier: Apache-2.0
"""The goals that are set. Not thread-safe: the session holds a lock."""

import unicodedata

from virst_engine.config import GoalParameters
from virst_engine.errors import BadGoal, UnknownGoal
from virst_engine.slow.plurals import is_plural
from virst_engine.types import Goal

MAX_ID_LENGTH = 128
MAX_INSTANCES = 254  # values of the mask image


def _control_character(text: str) -> str | None:
    # Cc control, Cs lone surrogate (cannot be encoded), Zl and Zp line and paragraph separators
    return next((c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)


def checked_sentence(sentence: str, longest: int) -> str:
    """The sentence without spaces around it. Raises BadGoal when it cannot be one, whatever the model."""
    text = sentence.strip()
    if not text:
        raise BadGoal("a goal must be a sentence, got an empty one; describe the object, like 'the red ball'")
    if len(text) > longest:
        raise BadGoal(f"a goal may have {longest} characters, got {len(text)}; shorten it or raise goal.max_length")
    bad = _control_character(text)
    if bad is not None:
        raise BadGoal(f"a goal must be one line of text, got the character U+{ord(bad):04X}; remove it")
    return text


class GoalBook:
    def __init__(self, parameters: GoalParameters, max_goals: int) -> None:
        self._parameters, self._max_goals = parameters, max_goals
        self._goals: dict[str, Goal] = {}
        self._named = 0

    def prepare(
        self,
        sentence: str,
        *,
        goal_id: str = "",
        object_id: str = "",
        camera: str = "",
        replace: bool = False,
        is_pointed_out: bool = False,
        max_instances: int = 1,
    ) -> Goal:
        """A goal that may be `put`: ids filled in, no instance id yet. Changes nothing.

        With `replace`, every other goal is to be cleared first, also the one of the same id. One that `is_pointed_out`
        needs no sentence. `max_instances`: see `Goal`; 0: as the sentence says, where `goal.split_plurals` is on.

        Raises:
            BadGoal: it cannot be set; the message says what to change.
        """
        text = "" if is_pointed_out else checked_sentence(sentence, self._parameters.max_length)
        for name, value in (("goal id", goal_id), ("object id", object_id), ("camera", camera)):
            if len(value) > MAX_ID_LENGTH or _control_character(value) is not None:
                raise BadGoal(f"a {name} must be one line of at most {MAX_ID_LENGTH} characters, got {value[:40]!r}")

        if not 0 <= max_instances <= MAX_INSTANCES:
            raise BadGoal(f"max_instances must be 0 to {MAX_INSTANCES}, got {max_instances}; 1 = one object, not split")
        if max_instances == 0:
            is_split = self._parameters.split_plurals and is_plural(text)
            max_instances = self._max_goals if is_split else 1

        alive = {} if replace else self._goals
        if goal_id in alive:
            raise BadGoal(f"goal id {goal_id!r} is set already; clear it first or choose another")
        if len(alive) >= self._max_goals:
            raise BadGoal(f"{self._max_goals} goals are set; clear one or raise tracking.max_objects")
        goal_id = goal_id or self._free_name()
        object_id = object_id or goal_id
        owner = next((g.goal_id for g in alive.values() if g.object_id == object_id), None)
        if owner is not None:
            raise BadGoal(f"object id {object_id!r} belongs to goal {owner!r}; choose another or clear that goal first")
        return Goal(goal_id, object_id, text, camera, max_instances=max_instances)

    def reconfigure(self, parameters: GoalParameters) -> None:
        """Take others for goals that are set from now on."""
        self._parameters = parameters

    def put(self, goal: Goal) -> None:
        """Set a goal that `prepare` allowed."""
        self._goals[goal.goal_id] = goal

    def clear(self, goal_id: str) -> Goal:
        """Raises UnknownGoal."""
        goal = self._goals.pop(goal_id, None)
        if goal is None:
            known = ", ".join(map(repr, self._goals)) or "none"
            raise UnknownGoal(f"goal id {goal_id[:MAX_ID_LENGTH]!r} is not set; goals that are: {known}")
        return goal

    def goals(self) -> tuple[Goal, ...]:
        """In the order in which they were set."""
        return tuple(self._goals.values())

    def _free_name(self) -> str:
        while True:
            self._named += 1
            name = f"goal_{self._named}"
            if name not in self._goals:
                return name
