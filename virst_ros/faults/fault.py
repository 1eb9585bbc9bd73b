# SPDX-License-Identifier: Apache-2.0
"""What a fault is, what is expected of the segmenter while it lasts, and the verdict. Data only; no ROS in it."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from virst_engine.errors import VirstError

if TYPE_CHECKING:
    from virst_ros.faults.harness import Harness, Segmenter

RECOVERY_S = 5.0  # longest time from the end of a fault to good masks


class FaultError(VirstError):
    """The segmenter did something else than what a fault expects of it, or a fault could not be brought about."""


class Masks(Enum):
    """What the masks do while a fault lasts."""

    OF_GOAL = "follow the object"  # with the stamps of their images
    COME = "go on"  # every image has its mask, but the object cannot be expected in it
    NONE = "pause"  # no image can be used
    ANY = "not judged"


class Reasoner(Enum):
    """Who answers the segmenter."""

    PROCESS = "process"  # the reasoner's own process, directly
    SCRIPTED = "scripted"  # one that passes requests on to a real one, and its answers back, changed as the fault says


@dataclass(frozen=True)
class SeenMask:
    """One message on the topic `mask`."""

    received_s: float  # time.monotonic()
    stamp_ns: int
    frame_id: str
    size: tuple[int, int]  # width, height
    is_known: bool  # an image of this stamp was sent
    iou: float  # of the goal's object with the truth; nan where the truth has none of it, or no goal is judged


# `inject` is entered to bring the fault about and left to end it. It may name the segmenter that it concerns (None: the
# one that runs all the time), and may call harness.cause_is_gone() when what follows is the segmenter's recovery.
Inject = Callable[["Harness"], AbstractContextManager["Segmenter | None"]]


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Args:
        what: what is done, in words.
        log, diagnostics, answer: regular expressions that must match the log, /diagnostics (messages that are not OK,
            and values) and the answers to the fault's own requests; empty where there is nothing that the node could
            know.
        masks: what they do meanwhile.
        least_s, most_s: how long it lasts at least, and how long everything expected is waited for at most.
        reasoner: who has to answer.
        refreshes: afterwards, the reasoner must have answered anew, too.
        two_cameras: it is done to one camera of a segmenter that has two.
        loses_goals: what is done ends all goals by design; the goal is set again when it is over.
        ends: the segmenter ends with this exit status.
        check: why the masks that came meanwhile are wrong; empty when they are not.
    """

    name: str
    what: str
    inject: Inject
    masks: Masks
    log: str = ""
    diagnostics: str = ""
    answer: str = ""
    least_s: float = 1.0
    most_s: float = 13.0
    reasoner: Reasoner = Reasoner.PROCESS
    refreshes: bool = False
    two_cameras: bool = False
    loses_goals: bool = False
    ends: int | None = None
    check: Callable[[list[SeenMask]], str] | None = None


@dataclass
class Verdict:
    """What became of one fault. `problems` is empty when the segmenter has survived it."""

    name: str
    what: str
    problems: list[str] = field(default_factory=list)
    recovery_s: float = math.nan  # nan: it did not come back
    recovers: bool = True  # False: it ends, or never began, by design
    lasted_s: float = 0.0
    log_line: str = ""
    diagnostics: str = ""
    answer: str = ""
    masks: str = ""
    goals: str = ""

    @property
    def survived(self) -> bool:
        return not self.problems

    @property
    def never_recovered(self) -> bool:
        """It should have come back, and did not."""
        return self.recovers and not math.isfinite(self.recovery_s)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "what": self.what,
            "survived": self.survived,
            "problems": self.problems,
            "recovers": self.recovers,
            "recovery_s": round(self.recovery_s, 2) if math.isfinite(self.recovery_s) else None,
            "lasted_s": round(self.lasted_s, 2),
            "log_line": self.log_line,
            "diagnostics": self.diagnostics,
            "answer": self.answer,
            "masks": self.masks,
            "goals": self.goals,
        }
