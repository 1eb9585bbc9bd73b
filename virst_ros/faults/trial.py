# SPDX-License-Identifier: Apache-2.0
"""Tries one fault: bring it about, listen until all that is expected was heard, end it, wait for good masks, judge."""

import itertools
import logging
import math
import re
import subprocess
import time
from contextlib import ExitStack

from virst_engine.errors import VirstError
from virst_ros.faults.fault import RECOVERY_S, Fault, FaultError, Masks, SeenMask, Verdict
from virst_ros.faults.harness import START_S, Harness
from virst_ros.faults.segmenter import Segmenter, wait_until

logger = logging.getLogger(__name__)

LONGEST_RECOVERY_S = 20.0  # waited for, so that a report can say how long it took
LONGEST_GAP_S = 2.5  # without a mask, while masks are expected to go on
ENOUGH_GOOD = 0.5  # of the masks that come while the goal's object should be in them


def try_fault(harness: Harness, fault: Fault) -> Verdict:
    """The verdict; never raises for what the segmenter does."""
    # Told to end, its end is the recovery; where it could not begin, there is nothing to come back to.
    verdict = Verdict(fault.name, fault.what, recovers=fault.ends in (None, 0))
    try:
        harness.settle(fault.reasoner, two_cameras=fault.two_cameras)
        _try(harness, fault, verdict)
    except VirstError as error:
        verdict.problems.append(str(error))
    except Exception as error:  # of the harness: the other faults are tried nevertheless
        logger.exception("the fault %s could not be tried", fault.name)
        verdict.problems.append(f"it could not be tried: {type(error).__name__}: {error}")
    return verdict


def _try(harness: Harness, fault: Fault, verdict: Verdict) -> None:
    main = harness.segmenter
    offset, begin_s = main.log_size(), time.monotonic()
    with ExitStack() as stack:
        subject = stack.enter_context(fault.inject(harness)) or main
        if subject is not main:
            offset = 0
        injected_s = begin_s if subject is main else time.monotonic()
        if fault.ends is not None:
            _wait_for_end(fault, subject, verdict)
        heard = _listen(harness, fault, subject, verdict, offset, begin_s)
        time.sleep(max(0.0, injected_s + fault.least_s - time.monotonic()))
        masks, until_s = subject.masks_since(injected_s), time.monotonic()
    ended_s = harness.ended_s or time.monotonic()
    verdict.lasted_s = ended_s - begin_s
    verdict.problems += heard
    if fault.ends is not None:
        return
    verdict.problems += _judge_masks(fault, masks, injected_s, until_s, verdict)
    _wait_for_recovery(harness, fault, subject, verdict, ended_s)


def _listen(
    harness: Harness, fault: Fault, subject: Segmenter, verdict: Verdict, offset: int, begin_s: float
) -> list[str]:
    """Until everything expected was heard; what was not, in words."""

    def hear() -> bool:
        verdict.log_line = subject.log_line(fault.log, offset) if fault.log else ""
        verdict.diagnostics = subject.told(fault.diagnostics, begin_s) if fault.diagnostics else ""
        is_dead = fault.ends is None and not subject.is_alive
        return is_dead or (
            bool(verdict.log_line or not fault.log) and bool(verdict.diagnostics or not fault.diagnostics)
        )

    if fault.answer:
        verdict.answer = " / ".join(dict.fromkeys(harness.answers))[:400]
    wait_until(hear, fault.most_s, period_s=0.1)
    problems = []
    for what, pattern, found in (
        ("log", fault.log, verdict.log_line),
        ("diagnostics", fault.diagnostics, verdict.diagnostics),
    ):
        if pattern and not found:
            problems.append(f"no word of the cause in the {what} (expected: {pattern})")
    if fault.answer and not _matches(fault.answer, harness.answers):
        problems.append(f"the answer does not name the cause (expected: {fault.answer}): {verdict.answer or 'none'}")
    return problems


def _matches(pattern: str, answers: list[str]) -> bool:
    return any(re.search(pattern, answer, re.DOTALL) for answer in answers)


def _wait_for_end(fault: Fault, subject: Segmenter, verdict: Verdict) -> None:
    assert subject.process is not None
    told_s = time.monotonic()
    wait_s = LONGEST_RECOVERY_S if fault.ends == 0 else START_S
    try:
        status = subject.process.wait(wait_s)
    except subprocess.TimeoutExpired:
        verdict.problems.append(f"it has not ended within {wait_s:g} s")
        subject.process.kill()
        subject.process.wait()
        return
    verdict.masks = verdict.goals = "end with it"
    if status != fault.ends:
        verdict.problems.append(f"it has ended with status {status}, not {fault.ends}")
    if fault.ends == 0:
        verdict.recovery_s = time.monotonic() - told_s
    if verdict.recovery_s > RECOVERY_S:
        verdict.problems.append(f"its end took {verdict.recovery_s:.1f} s")
    traceback = subject.log_line("^Traceback|terminate called|Segmentation fault")
    if traceback:
        verdict.problems.append(f"its end was not clean: {traceback}")


def _judge_masks(fault: Fault, masks: list[SeenMask], since_s: float, until_s: float, verdict: Verdict) -> list[str]:
    strange = [mask for mask in masks if not mask.is_known]
    judged = [mask for mask in masks if math.isfinite(mask.iou)]
    good = [mask for mask in judged if mask.iou >= 0.5]
    times_s = [since_s, *(mask.received_s for mask in masks), until_s]
    gap_s = max(later - earlier for earlier, later in itertools.pairwise(times_s))
    verdict.masks = f"{fault.masks.value}: {len(masks)} came, longest gap {gap_s:.1f} s"
    if judged:
        verdict.masks += f", {len(good)} of {len(judged)} on the object"
    problems = []
    if strange:
        problems.append(f"{len(strange)} masks carry a stamp that no image had ({strange[0].stamp_ns})")
    if fault.masks in (Masks.OF_GOAL, Masks.COME) and gap_s > LONGEST_GAP_S:
        problems.append(f"masks did not go on: none for {gap_s:.1f} s")
    if fault.masks is Masks.OF_GOAL and not judged:
        problems.append("no mask could be judged: none came of an image in which the object is")
    elif fault.masks is Masks.OF_GOAL and len(good) < ENOUGH_GOOD * len(judged):
        problems.append(f"the object was lost: {len(good)} of {len(judged)} masks were on it")
    if fault.check is not None:
        problem = fault.check(masks)
        problems += [problem] if problem else []
    return problems


def _wait_for_recovery(harness: Harness, fault: Fault, subject: Segmenter, verdict: Verdict, ended_s: float) -> None:
    if not subject.is_alive:
        status = subject.process.poll() if subject.process is not None else None
        raise FaultError(f"the segmenter has died (status {status}); the end of its log: {_last_line(subject)}")
    before = subject.goal_id
    if fault.loses_goals or not before:
        harness.set_base_goal(subject)
    recovered_s: float | None = None

    def look() -> bool:
        nonlocal recovered_s
        times_s = [harness.followed_s(subject, ended_s)]
        if fault.refreshes:
            times_s += [subject.refreshed_s(ended_s), _finite(max(subject.reasoner_is_well_s, ended_s))]
            times_s[-1] = None if subject.reasoner_problem else times_s[-1]
        if any(each is None for each in times_s):
            return not subject.is_alive
        recovered_s = max(each for each in times_s if each is not None)
        return True

    wait_until(look, LONGEST_RECOVERY_S, period_s=0.05)
    if not subject.is_alive:
        raise FaultError(f"the segmenter has died; the end of its log: {_last_line(subject)}")
    if recovered_s is None:
        verdict.problems.append(f"no recovery within {LONGEST_RECOVERY_S:g} s")
    else:
        verdict.recovery_s = recovered_s - ended_s
        if verdict.recovery_s > RECOVERY_S:
            verdict.problems.append(f"recovery took {verdict.recovery_s:.1f} s, at most {RECOVERY_S:g} are allowed")
    if fault.loses_goals:
        verdict.goals = "end by design"
    elif subject.goal_id in harness.goal_ids(subject):
        verdict.goals = "stay"
    else:
        verdict.goals = "lost"
        verdict.problems.append(f"the goal {before or subject.goal_id} is gone")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _last_line(subject: Segmenter) -> str:
    lines = subject.log.read_text(errors="replace").splitlines() if subject.log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "(it said nothing)")[:400]
