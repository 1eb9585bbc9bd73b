# SPDX-License-Identifier: Apache-2.0
"""Run the rows of a comparison over the same scenes, so that rows differ in nothing but their settings.

Scene by scene: a scene is simulated once, and every row that lacks it answers its questions. What is done is in the
JSON file after each scene, so a run that was broken off, or gets more rows or scenes, goes on where it was; figures of
another version of the code, of other weights or other settings are not counted.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from virst_engine.errors import VirstError
from virst_engine.evaluate.cases import Case, load_case
from virst_engine.evaluate.compare_rows import DELAYED, OFFLINE, STREAM, Row
from virst_engine.evaluate.compare_summary import figures
from virst_engine.evaluate.comparison import SEEDS, ComparedScenes, Comparison, Run
from virst_engine.evaluate.metrics import SequenceScore
from virst_engine.evaluate.modes import System, load_system
from virst_engine.evaluate.provenance import code_version, command_line, device_description, versions
from virst_engine.evaluate.runner import LoadCase, LoadSystem, evaluate_scene, measure_times
from virst_engine.evaluate.settings import EvaluationSettings
from virst_engine.evaluate.summary import ExpressionScore
from virst_engine.evaluate.workers import in_processes

logger = logging.getLogger(__name__)

FORMAT = "virst-comparison-1"
DIGITS = 5
MEASURED_FRAMES = 40  # after the goal's, in which the reasoner is timed
MODE_OF_WAY = {OFFLINE: "offline", STREAM: "stream", DELAYED: "realtime"}
# Settings that say how something is run and not what: the figures do not depend on them, or they are kept beside them.
NOT_COMPARED = ("scenes", "scenes_count", "threads", "weights", "reasoner_weights", "reasoner_delay_s", "frame_time_s")


def compare(
    rows: tuple[Row, ...],
    scenes: ComparedScenes,
    file: Path,
    *,
    workers: int = 1,
    delay_s: float | None = None,
    on_scene: Callable[[int, int], None] = lambda done, total: None,
    system_of: LoadSystem = load_system,
    case_of: LoadCase = load_case,
) -> Comparison:
    """Run what `file` lacks of the rows, and keep it there.

    Args:
        workers: processes; 1 runs in this one. The figures do not depend on it.
        delay_s: how late answers are; None: as the file says, or as measured here and now.
        on_scene: called with scenes done and scenes to do, first with none done.
        system_of, case_of: what is evaluated on what; module-level functions, for they travel to the workers.

    Raises:
        VirstError: the file holds something else, or the simulator cannot be used. A row whose weights are not there
            is skipped, and one whose method fails is given up; both say why.
    """
    kept = _read(file)
    systems: dict[EvaluationSettings, System] = {}
    comparison = plan(rows, scenes, kept, systems, delay_s=delay_s, system_of=system_of, case_of=case_of)
    _write(file, comparison, kept)
    if workers > 1:
        systems.clear()  # each worker has its own
    wanted = {scene: runs_that_lack(comparison, scene) for scene in scenes.in_turns}
    jobs = {scene: runs for scene, runs in wanted.items() if runs}
    on_scene(0, len(jobs))
    for done, (_, answers) in enumerate(_all_jobs(jobs, workers, systems, system_of, case_of), start=1):
        for key, (scene, scores, failed) in answers.items():
            comparison.runs[key].failed = comparison.runs[key].failed or failed
            if not failed:
                comparison.runs[key].scores[scene] = [_score_from(_score_to(each)) for each in scores]  # as kept
        _write(file, comparison, kept)
        on_scene(done, len(jobs))
    _write(file, comparison, kept, figures(comparison))
    return comparison


def runs_that_lack(comparison: Comparison, scene: int) -> tuple[tuple[str, EvaluationSettings], ...]:
    """(key, settings) of the runs that lack a scene."""
    return tuple((run.key, run.settings) for run in comparison.runs.values() if run.missing([scene]))


def plan(
    rows: tuple[Row, ...],
    scenes: ComparedScenes,
    kept: dict[str, Any],
    systems: dict[EvaluationSettings, System],
    *,
    delay_s: float | None,
    system_of: LoadSystem,
    case_of: LoadCase,
) -> Comparison:
    """Which runs the rows need, with what is known of them already; measures how late answers are where that is not.

    `systems` gets those that were loaded on the way.
    """
    comparison = Comparison(rows, scenes, {}, {}, {})
    version = code_version()
    for row in rows:
        settings = replace(row.settings, reasoner_weights=_shipped(row.shipped)) if row.shipped else row.settings
        try:
            system = _system(settings, systems, system_of)
            identity = _identity(settings)
        except (VirstError, ValueError) as error:
            comparison.skipped[row.name] = str(error)
            continue
        for way in row.ways:
            of_way = replace(settings, mode=MODE_OF_WAY[way])
            key = _key(of_way, version, identity)
            comparison.key_of[row.name, way] = key
            if key in comparison.runs:
                continue
            known = kept.get("runs", {}).get(key, {})
            if way == DELAYED:
                late_s = known.get("reasoner_delay_s") if delay_s is None else delay_s
                if late_s is None:
                    case = case_of(of_way, scenes.in_turns[0])
                    case = replace(case, frames=case.frames[: case.goal_frame + MEASURED_FRAMES])
                    late_s = round(measure_times(system, case)[1], 4)
                if late_s != known.get("reasoner_delay_s"):
                    known = {}
                of_way = replace(of_way, reasoner_delay_s=late_s)
            comparison.runs[key] = Run(key, of_way, _scores_from(known))
    return comparison


def _shipped(name: str) -> str:
    from virst_engine.weights import SHIPPED

    return str(SHIPPED / name)


def _identity(settings: EvaluationSettings) -> str:
    """What tells the weights of a run from others."""
    from virst_engine.weights import detector_identity, reasoner_identity, weights_identity

    model = settings.engine_config().model
    reasoner = reasoner_identity(model, settings.method, settings.reasoner_weights)
    if settings.method == "grounding":  # its answers mean the same to any segmenter, but are not the same
        reasoner += f" {detector_identity(settings.detector, model)}"
    return f"{weights_identity(model)}, {reasoner}"


def _key(settings: EvaluationSettings, version: str, identity: str) -> str:
    described = {name: value for name, value in settings.described().items() if name not in NOT_COMPARED}
    text = json.dumps([described, version, identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# one scene, all runs that lack it: in this process or in a worker

Answers = dict[str, tuple[int, list[ExpressionScore], str]]  # key of the run -> scene, scores, why it failed
Wanted = tuple[tuple[str, EvaluationSettings], ...]


def _all_jobs(
    jobs: dict[int, Wanted],
    workers: int,
    systems: dict[EvaluationSettings, System],
    system_of: LoadSystem,
    case_of: LoadCase,
) -> Iterator[tuple[int, Answers]]:
    if workers <= 1:
        for scene, wanted in jobs.items():
            yield scene, _answer_scene(wanted, scene, systems, system_of, case_of)
        return
    arguments = {scene: (wanted, scene, system_of, case_of) for scene, wanted in jobs.items()}
    yield from in_processes(_work, arguments, workers)


_systems: dict[EvaluationSettings, System] = {}  # of this worker process


def _work(wanted: Wanted, scene: int, system_of: LoadSystem, case_of: LoadCase) -> Answers:
    return _answer_scene(wanted, scene, _systems, system_of, case_of)


def _answer_scene(
    wanted: Wanted,
    scene: int,
    systems: dict[EvaluationSettings, System],
    system_of: LoadSystem,
    case_of: LoadCase,
) -> Answers:
    case = case_of(wanted[0][1], scene)  # the rows differ in nothing that a scene or its questions depend on

    def same_case(settings: EvaluationSettings, number: int) -> Case:
        assert number == scene
        return case

    answers: Answers = {}
    for key, settings in wanted:
        try:
            system = _system(settings, systems, system_of)
            answers[key] = scene, [each.score for each in evaluate_scene(system, settings, scene, same_case)], ""
        except VirstError as error:
            logger.warning("scene %d, %s: %s", scene, settings, error)
            answers[key] = scene, [], f"scene {scene}: {error}"
    return answers


def _system(settings: EvaluationSettings, systems: dict[EvaluationSettings, System], system_of: LoadSystem) -> System:
    """The system of the settings; networks that rows share are loaded once."""
    config = settings.engine_config()
    networks = replace(
        settings, mode="stream", anchors="dynamic", anchor_count=0, alpha=EvaluationSettings.alpha, reasoner_delay_s=0.0
    )
    if networks not in systems:
        systems[networks] = system_of(networks)
    loaded = systems[networks]
    return replace(loaded, config=replace(loaded.config, memory=config.memory))


# the file


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VirstError(f"cannot read the comparison {file}: {error}; give another --json file") from error
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        raise VirstError(f"{file} is no comparison of this version; give another --json file, or delete it")
    return kept


def _write(file: Path, comparison: Comparison, kept: dict[str, Any], summary: dict[str, Any] | None = None) -> None:
    """All at once: a process that is killed leaves the file of before. Runs of other settings are kept, too."""
    runs = dict(kept.get("runs", {}))
    for run in comparison.runs.values():
        runs[run.key] = {
            "settings": {
                **run.settings.described(),
                "weights": Path(run.settings.weights).name or "shipped",
                "reasoner_weights": Path(run.settings.reasoner_weights).name or "shipped",
            },
            "reasoner_delay_s": run.settings.reasoner_delay_s,
            "failed": run.failed,
            "scores": {str(scene): [_score_to(each) for each in scores] for scene, scores in run.scores.items()},
        }
    content = {
        "format": FORMAT,
        "command": command_line(),
        "code": code_version(),
        "device": device_description(),
        "versions": versions(),
        "scenes": [f"{seeds.start}:{seeds.stop}" for seeds in map(comparison.scenes.of_seed, range(SEEDS))],
        "rows": {
            row.name: {
                "group": row.group,
                "label": row.label,
                "runs": {way: key for (name, way), key in comparison.key_of.items() if name == row.name},
                "skipped": comparison.skipped.get(row.name, ""),
            }
            for row in comparison.rows
        },
        "figures": summary,  # when all is done
        "runs": runs,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(file)


def _scores_from(known: dict[str, Any]) -> dict[int, list[ExpressionScore]]:
    return {int(scene): [_score_from(each) for each in scores] for scene, scores in known.get("scores", {}).items()}


def _score_to(score: ExpressionScore) -> dict[str, Any]:
    return _rounded(asdict(score))


def _score_from(raw: dict[str, Any]) -> ExpressionScore:
    raw = {**raw, "score": SequenceScore(**raw["score"]), "course": tuple(raw["course"])}
    return ExpressionScore(**raw)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return round(value, DIGITS) if isinstance(value, float) else value
