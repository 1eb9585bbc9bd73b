# SPDX-License-Identifier: Apache-2.0
"""Comparisons on the fake network and fake scenes: every row on the same scenes, nothing run twice, nothing hidden."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.evaluate.test_runner import fake_case, fake_system
from tests.fakes import FakeReasoner, FakeStages, small_config
from virst_engine.errors import SceneError, VirstError, WeightsError
from virst_engine.evaluate import compare as module
from virst_engine.evaluate.compare import compare
from virst_engine.evaluate.compare_page import page, write_page, written_by_hand
from virst_engine.evaluate.compare_plot import bars, draw_comparison
from virst_engine.evaluate.compare_rows import CLAIMS, DELAYED, GROUPS, OFFLINE, STREAM, Claim, Row, default_rows
from virst_engine.evaluate.compare_summary import (
    Figure,
    difference,
    figures,
    run_figures,
    streams_within,
    verdict_of,
    verdicts,
)
from virst_engine.evaluate.comparison import SEEDS, ComparedScenes
from virst_engine.evaluate.modes import System
from virst_engine.evaluate.runner import evaluate_scene
from virst_engine.evaluate.settings import EvaluationSettings
from virst_engine.slow.reasoner import Reasoner
from virst_engine.types import ReasonerAnswer, ReasonerRequest

TWO = ComparedScenes(2)
PLAIN = EvaluationSettings()
SEEING = Row("seeing", "methods", "finds what is asked for", (OFFLINE, STREAM, DELAYED), PLAIN)
BLIND = Row("blind", "methods", "finds nothing", (OFFLINE, STREAM), replace(PLAIN, no_second_fusion=True))
SAME = Row("same", "anchors", "the same as seeing", (OFFLINE,), PLAIN)
TEMPVRS = replace(PLAIN, method="tempvrs")
LACKING = Row("lacking", "supervision", "needs a file", (OFFLINE,), TEMPVRS, "nowhere.safetensors")


class Counting:
    """A module-level stand-in for load_system and load_case that counts what it is asked for."""

    def __init__(self):
        self.loaded: list[EvaluationSettings] = []
        self.scenes: list[int] = []

    def system(self, settings: EvaluationSettings) -> System:
        if settings.reasoner_weights:
            raise WeightsError(f"no file {settings.reasoner_weights}; train it")
        self.loaded.append(settings)
        system = fake_system(settings)
        return replace(system, reasoner=FakeReasoner(nothing)) if settings.no_second_fusion else system

    def case(self, settings: EvaluationSettings, scene: int):
        self.scenes.append(scene)
        return fake_case(settings, scene)


def nothing(request):
    return (-9.0, -9.0, -9.0)


@pytest.fixture
def counting():
    return Counting()


def run(rows, file, counting, scenes=TWO, **rest):
    return compare(rows, scenes, file, system_of=counting.system, case_of=counting.case, **rest)


def test_every_row_answers_the_same_scenes_of_three_seeds(tmp_path, counting):
    steps = []
    comparison = run((SEEING, BLIND), tmp_path / "a.json", counting, on_scene=lambda *step: steps.append(step))
    assert steps == [(done, 6) for done in range(7)]
    assert TWO.in_turns == [1_100_000, 1_101_000, 1_102_000, 1_100_001, 1_101_001, 1_102_001]
    assert counting.scenes[1:] == TWO.in_turns  # the first was to measure how late answers are
    seeing, blind = (comparison.run_of(name, STREAM) for name in ("seeing", "blind"))
    assert set(seeing.scores) == set(blind.scores) == set(TWO.in_turns)
    asked = [[each.sentence for scene in TWO.in_turns for each in row.scores[scene]] for row in (seeing, blind)]
    assert asked[0] == asked[1]


def test_figures_are_means_over_sentences_with_the_spread_of_the_seeds(tmp_path, counting):
    comparison = run((SEEING, BLIND), tmp_path / "a.json", counting)
    told = run_figures(comparison, comparison.run_of("seeing", STREAM))
    scores = [each for found in comparison.run_of("seeing", STREAM).scores.values() for each in found]
    values = [(s.scene, 100 * s.score.jf) for s in scores if not s.absent]
    of_seeds = [np.mean([value for scene, value in values if scene in TWO.of_seed(seed)]) for seed in range(SEEDS)]
    assert told["JF"]["all"]["mean"] == pytest.approx(np.mean([value for _, value in values]), abs=0.01)
    assert told["JF"]["all"]["sd"] == pytest.approx(np.std(of_seeds, ddof=1), abs=0.01)
    assert told["JF"]["all"]["n"] == len(values)
    assert told["scenes"] == 6
    low, high = told["JF"]["all"]["ci"]
    assert low <= told["JF"]["all"]["mean"] <= high
    assert 0 <= told["R_0_255"]["mean"] <= told["R"]["mean"] <= 100
    found_nothing = run_figures(comparison, comparison.run_of("blind", STREAM))
    assert found_nothing["absent_right"]["mean"] == 100.0
    assert found_nothing["JF"]["all"]["mean"] < told["JF"]["all"]["mean"]


def test_what_streaming_costs_is_a_difference_of_the_same_sentences(tmp_path, counting):
    comparison = run((SEEING,), tmp_path / "a.json", counting)
    offline, delayed = (comparison.run_of("seeing", way) for way in (OFFLINE, DELAYED))
    gap = difference(comparison, delayed, offline)
    means = [run_figures(comparison, each)["JF"]["all"]["mean"] for each in (delayed, offline)]
    assert gap.mean == pytest.approx(means[0] - means[1], abs=0.02)
    told = figures(comparison)["rows"]["seeing"]["streaming"]
    assert told["delayed"]["all_frames"]["mean"] == gap.mean
    assert set(told) == {"stream", "delayed"}
    assert delayed.settings.reasoner_delay_s > 0
    assert delayed.settings.frame_time_s == 0


def test_nothing_is_run_twice(tmp_path, counting):
    file = tmp_path / "a.json"
    first = run((SEEING, BLIND), file, counting)
    counting.scenes.clear()
    steps = []
    again = run((SEEING, BLIND), file, counting, on_scene=lambda *step: steps.append(step))
    assert (steps, counting.scenes) == ([(0, 0)], [])
    assert figures(again) == figures(first) == json.loads(file.read_text())["figures"]


def test_more_scenes_and_more_rows_go_on_with_what_is_there(tmp_path, counting):
    file = tmp_path / "a.json"
    run((SEEING,), file, counting)
    counting.scenes.clear()
    more = run((SEEING, BLIND), file, counting)
    assert counting.scenes == TWO.in_turns  # the new row alone, whose scenes each have to be drawn
    assert set(more.run_of("seeing", DELAYED).scores) == set(TWO.in_turns)
    counting.scenes.clear()
    run((SEEING, BLIND), file, counting, ComparedScenes(3))
    assert counting.scenes == [1_100_002, 1_101_002, 1_102_002]


def test_what_was_broken_off_is_kept(tmp_path, counting):
    file = tmp_path / "a.json"

    def stop_after_two(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run((SEEING,), file, counting, on_scene=stop_after_two)
    counting.scenes.clear()
    run((SEEING,), file, counting)
    assert counting.scenes == TWO.in_turns[2:]


def test_figures_of_other_code_are_not_counted(tmp_path, counting, monkeypatch):
    file = tmp_path / "a.json"
    run((BLIND,), file, counting)
    counting.scenes.clear()
    monkeypatch.setattr(module, "code_version", lambda: "another")
    run((BLIND,), file, counting)
    assert counting.scenes == TWO.in_turns


def test_another_delay_is_another_run(tmp_path, counting):
    file = tmp_path / "a.json"
    row = replace(SEEING, ways=(DELAYED,))
    first = run((row,), file, counting, delay_s=0.25)
    assert first.run_of("seeing", DELAYED).settings.reasoner_delay_s == 0.25
    counting.scenes.clear()
    assert run((row,), file, counting).run_of("seeing", DELAYED).settings.reasoner_delay_s == 0.25
    assert counting.scenes == []
    later = run((row,), file, counting, delay_s=0.35)
    assert counting.scenes == TWO.in_turns
    delays = [run_figures(each, each.run_of("seeing", DELAYED))["JF"]["all"]["mean"] for each in (first, later)]
    assert delays[0] > delays[1]  # nothing is found before the first answer


def test_networks_that_rows_share_are_loaded_once(tmp_path, counting):
    settings = [replace(PLAIN, mode="offline", alpha=alpha) for alpha in (1, 2, 3)]
    alphas = tuple(Row(f"alpha-{each.alpha}", "alpha", "", (OFFLINE,), each) for each in settings)
    seen = []

    def system(settings):
        made = counting.system(settings)
        return replace(made, config=replace(made.config, memory=settings.engine_config().memory))

    def evaluate(system, settings, *rest):
        seen.append((settings.alpha, system.config.memory.anchors_attended))
        return evaluate_scene(system, settings, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "evaluate_scene", evaluate)
        compare((SEEING, *alphas), ComparedScenes(1), tmp_path / "a.json", system_of=system, case_of=counting.case)
    assert len(counting.loaded) == 1
    assert set(seen) == {(1, 1), (2, 2), (3, 3)}


def test_rows_of_the_same_settings_are_run_once(tmp_path, counting):
    comparison = run((SEEING, SAME), tmp_path / "a.json", counting)
    assert comparison.run_of("same", OFFLINE) is comparison.run_of("seeing", OFFLINE)
    assert len(comparison.runs) == 3


def test_a_row_without_its_weights_is_skipped_and_says_so(tmp_path, counting):
    file = tmp_path / "a.json"
    unknown = Row("unknown", "top-k", "k = 3", (OFFLINE,), replace(PLAIN, reasoner=(("no_such_thing", 3),)))
    comparison = run((BLIND, LACKING, unknown), file, counting)
    assert set(comparison.skipped) == {"lacking", "unknown"}
    text = page(comparison)
    assert "`lacking` was skipped: no file" in text
    assert "`unknown` was skipped: this version has no parameter reasoner.no_such_thing" in text
    assert "train it" in json.loads(file.read_text())["rows"]["lacking"]["skipped"]


class Refuses(Reasoner):
    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        raise VirstError("this method understands nothing")


def test_a_method_that_fails_is_given_up_and_the_others_go_on(tmp_path, counting):
    def system(settings):
        if settings.no_second_fusion:
            return System(FakeStages(), Refuses(), small_config(clip_frames=4))
        return counting.system(settings)

    failing = replace(BLIND, ways=(OFFLINE,))
    comparison = compare((SEEING, failing), TWO, tmp_path / "a.json", system_of=system, case_of=counting.case)
    assert comparison.run_of("blind", OFFLINE).failed.endswith("understands nothing")
    assert set(comparison.run_of("seeing", OFFLINE).scores) == set(TWO.in_turns)
    assert "was given up: scene 1100000: this method understands nothing" in page(comparison)


def test_another_file_is_not_overwritten(tmp_path, counting):
    file = tmp_path / "a.json"
    for text in ("{}", "[]", "no json"):
        file.write_text(text)
        with pytest.raises(VirstError, match="another --json file"):
            run((BLIND,), file, counting)
        assert file.read_text() == text


@pytest.mark.parametrize(
    ("low", "high", "points", "says"),
    [
        (0.5, 4.0, 0.0, "reproduced"),
        (-3.0, -0.1, 0.0, "reversed"),
        (-1.0, 2.0, 0.0, "not distinguishable"),
        (2.0, 6.0, 3.0, "met; reproduced"),
        (0.5, 3.0, 3.0, "missed; reproduced"),
        (-4.0, 1.0, 2.0, "missed; not distinguishable"),
    ],
)
def test_what_the_figures_say_of_a_claim(low, high, points, says):
    claim = Claim("a paper", "one", "other", OFFLINE, points)
    assert verdict_of(Figure((low + high) / 2, 1.0, (low, high), 100, 50), claim) == says
    few = verdict_of(Figure((low + high) / 2, 1.0, (low, high), 100, 9), claim)
    assert few.endswith("not distinguishable")  # whatever the interval


def test_an_order_is_told_from_the_scores(tmp_path, counting):
    rows = tuple(replace(row, ways=(OFFLINE,)) for row in (SEEING, BLIND))
    comparison = run(rows, tmp_path / "a.json", counting, ComparedScenes(4))
    claims = (
        Claim("a paper", "seeing", "blind", OFFLINE),
        Claim("another", "blind", "seeing", OFFLINE),
        Claim("a third", "seeing", "not here", OFFLINE),
    )
    assert [verdict.says for verdict in verdicts(comparison, claims)] == ["reproduced", "reversed"]


@pytest.mark.parametrize(("mean", "says"), [(-2.9, "met"), (-3.1, "missed"), (None, "not run")])
def test_streaming_may_cost_three_points(mean, says):
    assert streams_within(Figure(mean, None, None, 1)) == says


def test_what_people_wrote_into_the_page_stays(tmp_path, counting):
    comparison = run((BLIND,), tmp_path / "a.json", counting)
    file = tmp_path / "new" / "page.md"
    text = write_page(comparison, file)
    assert written_by_hand(text) == ""
    file.write_text(text.replace("Not written yet.", "Because it is blind.\n\nTruly."))
    again = write_page(comparison, file)
    assert written_by_hand(again) == "Because it is blind.\n\nTruly."
    assert again == file.read_text()


def test_the_plot_has_a_bar_for_every_row_and_way(tmp_path, counting):
    pytest.importorskip("matplotlib")
    comparison = run((SEEING, BLIND, LACKING), tmp_path / "a.json", counting)
    drawn = bars(comparison, "methods")
    assert {label: set(ways) for label, ways in drawn.items()} == {
        SEEING.label: {OFFLINE, STREAM, DELAYED},
        BLIND.label: {OFFLINE, STREAM},
    }
    assert bars(comparison, "supervision") == {}
    draw_comparison(comparison, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_row_can_be_run_on_long_scenes():
    rows = default_rows(long_s=100.0)
    assert {row.settings.frames for row in rows} == {1000}
    assert [row.name for row in rows] == [row.name for row in default_rows()]


def test_the_rows_are_told_apart_and_claims_are_about_rows():
    rows = default_rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert {row.group for row in rows} == set(GROUPS)
    ways = {row.name: row.ways for row in rows}
    for claim in CLAIMS:
        assert claim.way in ways[claim.better]
        assert claim.way in ways[claim.worse]
        if claim.papers is not None:
            assert claim.papers[0] >= claim.papers[1]


@pytest.mark.slow
def test_two_workers_give_the_figures_of_one(tmp_path):
    alone = compare((SAME,), TWO, tmp_path / "a.json", system_of=fake_system, case_of=fake_case)
    shared = compare((SAME,), TWO, tmp_path / "b.json", workers=2, system_of=fake_system, case_of=fake_case)
    assert figures(alone) == figures(shared)


@pytest.mark.slow
def test_the_shipped_model_over_drawn_scenes(tmp_path):
    """Closed loop: a scene of each seed is simulated and drawn, and the model that ships answers for it."""
    rows = tuple(replace(r, ways=(OFFLINE,)) for r in default_rows() if r.name in ("fusion-both", "fusion-neither"))
    try:
        comparison = compare(rows, ComparedScenes(1), tmp_path / "a.json")
    except SceneError as error:
        pytest.skip(str(error))
    assert not comparison.skipped
    both, neither = (run_figures(comparison, comparison.run_of(row.name, OFFLINE)) for row in rows)
    assert both["JF"]["all"]["n"] == neither["JF"]["all"]["n"] >= 6
    assert both["JF"]["all"]["mean"] > 70  # a wrong object or an empty mask gives 0
    assert both["R"]["mean"] > 80
    assert both["JF"]["all"]["mean"] != neither["JF"]["all"]["mean"]  # the fusion is off in the second row
