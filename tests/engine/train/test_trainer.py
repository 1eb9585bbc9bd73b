# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a few steps: every stage learns, what is frozen stays, a resumed run ends as if it never stopped."""

import math
import pickle
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from tests.engine.data.fake_scenes import two_scenes
from tests.engine.model.small_models import SMALL
from virst_engine.errors import WeightsError
from virst_engine.model.config import VirstConfig
from virst_engine.model.virst import Virst
from virst_engine.sim.grammar import KINDS_FULL
from virst_engine.train.config import LossWeights, StageConfig, TrainConfig, tabletop_tiny_training
from virst_engine.train.steps import ReadOuts
from virst_engine.train.trainer import Progress, Trainer

ENCODER = "seg_model.image_encoder."
STAGES = (
    StageConfig("pretraining", "pretraining", 2, 1e-3, clips=2, sentences=2, clip_frames=2, warmup_steps=1),
    StageConfig(
        "alignment", "image", 2, 1e-3, (ENCODER,), clips=2, sentences=3, clip_frames=2, anchors=2, warmup_steps=1
    ),
    StageConfig("few-image", "image", 2, 1e-3, clips=2, sentences=2, clip_frames=3, warmup_steps=1),
    StageConfig(
        "propagation", "propagation", 2, 1e-3, clips=2, sentences=2, clip_frames=3, propagation_frames=2,
        warmup_steps=1,
    ),
)  # fmt: skip
CONFIG = TrainConfig(STAGES, clip_stride=2, checkpoint_every=1000, bf16=False)


def trainer_of(
    folder: Path,
    stages: Sequence[StageConfig] = STAGES,
    model: VirstConfig = SMALL,
    scalars: "Curves | None" = None,
    bf16: bool = False,
) -> Trainer:
    torch.manual_seed(0)
    heads = ReadOuts(model, colours=2, shapes=2)
    config = replace(CONFIG, stages=tuple(stages), bf16=bf16)
    return Trainer(Virst(model), heads, config, two_scenes(), folder=folder, scalars=scalars, loader_workers=0)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def spring() -> None:
    Trap.sprung = True


class Trap:
    """Unpickling it executes code."""

    sprung = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return spring, ()


class Curves:
    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.points.append((tag, scalar_value, global_step))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[Progress], Curves]:
    """All stages without a break."""
    curves, reports = Curves(), []
    trainer = trainer_of(tmp_path_factory.mktemp("whole"), scalars=curves)
    assert trainer.run(reports.append)
    return trainer, reports, curves


def test_all_stages_run_in_order_with_finite_losses(whole_run: tuple[Trainer, list[Progress], Curves]) -> None:
    _, reports, _ = whole_run
    assert [(r.stage, r.step, r.steps) for r in reports] == [(s.name, i, 2) for s in STAGES for i in (1, 2)]
    for report in reports:
        assert all(math.isfinite(value) for value in report.losses.values()), report
        assert report.losses["gradient"] > 0
        weights = LossWeights()
        total = sum(
            getattr(weights, name) * value for name, value in report.losses.items() if name not in ("total", "gradient")
        )
        assert report.loss == pytest.approx(total, rel=1e-4)


def test_each_stage_has_its_losses(whole_run: tuple[Trainer, list[Progress], Curves]) -> None:
    _, reports, _ = whole_run
    known = {field.name for field in fields(LossWeights)}
    for report in reports:
        losses = set(report.losses) - {"total", "gradient"}
        assert {"bce", "dice", "occlusion", "iou"} <= losses <= known
        assert ("attribute" in losses) == (report.stage != "alignment")  # its image encoder is frozen
        assert ({"token", "attention"} <= losses) == (report.stage != "pretraining")


def test_curves_count_steps_over_all_stages(whole_run: tuple[Trainer, list[Progress], Curves]) -> None:
    *_, curves = whole_run
    assert [step for tag, _, step in curves.points if tag.endswith("/bce")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {tag.split("/")[0] for tag, _, _ in curves.points} == {stage.name for stage in STAGES}


def test_training_in_bfloat16_stays_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virst_engine.train.trainer.computes_bf16", lambda device: True)
    reports: list[Progress] = []
    trainer = trainer_of(tmp_path, [replace(stage, steps=1) for stage in STAGES], bf16=True)
    trainer.run(reports.append)
    assert trainer.precision == "bfloat16"
    assert all(math.isfinite(value) for report in reports for value in report.losses.values())


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx2": True, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_bfloat16_is_used_where_the_processor_computes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert trainer_of(tmp_path, bf16=True).precision == precision
    assert trainer_of(tmp_path, bf16=False).precision == "float32"


@pytest.mark.parametrize("frozen", [(ENCODER,), ("seg_model.",), ("video_encoder.", "language_model.")])
def test_what_is_frozen_stays_bit_equal_and_the_rest_learns(tmp_path: Path, frozen: tuple[str, ...]) -> None:
    trainer = trainer_of(tmp_path, [replace(STAGES[2], frozen=frozen)])
    before = state_of(trainer)
    trainer.run()
    moved = changed(before, state_of(trainer))
    assert not [name for name in moved if name.startswith(frozen)]  # BatchNorm's statistics included
    for part in ("seg_prompter.", "initial_seg_fusion_module.", "st_embedding", "mm_projector.", "lm_head."):
        assert [name for name in moved if name.startswith(part)], part
    if frozen == (ENCODER,):
        for part in ("seg_model.sam_mask_decoder.transformer.", "language_model.", "video_encoder."):
            assert [name for name in moved if name.startswith(part)], part


def test_a_frozen_part_is_free_again_in_the_next_stage(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, STAGES[1:3])
    start = state_of(trainer)
    for _ in range(2):
        trainer.run(until=-math.inf)  # one step each
    assert (trainer.stage_number, trainer.step) == (1, 0)
    assert not [name for name in changed(start, state_of(trainer)) if name.startswith(ENCODER)]
    trainer.run()
    assert [name for name in changed(start, state_of(trainer)) if name.startswith(ENCODER)]


@pytest.mark.parametrize("part", ["memory_attention.", "memory_encoder.", "maskmem_tpos_enc", "obj_ptr_tpos_proj."])
def test_propagation_teaches_the_memory(
    whole_run: tuple[Trainer, list[Progress], Curves], part: str, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, [replace(STAGES[3], steps=1)])
    before = state_of(trainer)
    trainer.run()
    assert [name for name in changed(before, state_of(trainer)) if name.startswith(f"seg_model.{part}")]


@pytest.mark.parametrize("steps_before", [1, 2, 3, 7])
def test_a_resumed_run_is_bit_equal_to_one_without_a_break(
    whole_run: tuple[Trainer, list[Progress], Curves], tmp_path: Path, steps_before: int
) -> None:
    first = trainer_of(tmp_path)
    for _ in range(steps_before):
        first.run(until=-math.inf)  # one step each
    assert sum(s.steps for s in STAGES[: first.stage_number]) + first.step == steps_before
    torch.manual_seed(99)  # nothing of the process may matter
    second = trainer_of(tmp_path)
    second.resume()
    assert (second.stage_number, second.step) == (first.stage_number, first.step)
    assert second.run()
    assert changed(state_of(whole_run[0]), state_of(second)) == set()


def test_batches_and_draws_depend_on_the_seed_only(tmp_path: Path) -> None:
    first, second, other = (trainer_of(tmp_path / str(i), STAGES[:1]) for i in range(3))
    other.config = replace(other.config, seed=1)
    for trainer in (first, second, other):
        torch.rand(7)
        trainer.run()
    assert changed(state_of(first), state_of(second)) == set()
    assert changed(state_of(first), state_of(other))


def test_until_stops_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    reports: list[Progress] = []
    assert not trainer.run(reports.append, until=time.monotonic() - 1)
    assert len(reports) == 1
    assert trainer.checkpoint.is_file()
    resumed = trainer_of(tmp_path)
    resumed.resume()
    assert (resumed.stage_number, resumed.step) == (0, 1)
    assert resumed.seconds > 0
    assert changed(state_of(trainer), state_of(resumed)) == set()


def test_a_finished_run_is_not_run_again(whole_run: tuple[Trainer, list[Progress], Curves], tmp_path: Path) -> None:
    done = whole_run[0]
    again = trainer_of(done.folder)
    again.resume()
    reports: list[Progress] = []
    assert again.run(reports.append)
    assert reports == []
    assert changed(state_of(done), state_of(again)) == set()


def test_checkpoints_are_written_while_it_runs(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [replace(STAGES[0], steps=3)])
    trainer.config = replace(trainer.config, checkpoint_every=2)
    steps: list[int] = []

    def report(progress: Progress) -> None:
        if trainer.checkpoint.is_file():
            steps.append(torch.load(trainer.checkpoint, weights_only=True)["step"])

    trainer.run(report)
    assert steps == [2]  # seen at step 3
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda path: path.unlink(), "there is no checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "damaged or no checkpoint"),
        (lambda path: path.write_bytes(b"no checkpoint"), "damaged or no checkpoint"),
        (lambda path: torch.save({"step": 1}, path), "damaged or no checkpoint"),
        (lambda path: path.write_bytes(pickle.dumps(Trap(), protocol=2)), "damaged or no checkpoint"),
    ],
)
def test_a_missing_or_damaged_checkpoint_is_named(tmp_path: Path, damage: Callable[[Path], object], cause: str) -> None:
    trainer = trainer_of(tmp_path)
    trainer.save()
    damage(trainer.checkpoint)
    with pytest.raises(WeightsError) as caught:
        trainer_of(tmp_path).resume()
    for part in (cause, str(trainer.checkpoint), "start without --resume"):
        assert part in str(caught.value)
    assert not Trap.sprung


def test_a_checkpoint_of_another_model_or_of_other_stages_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path, STAGES[1:]).save()
    other = replace(SMALL, sam2=replace(SMALL.sam2, memory_frames=4))
    with pytest.raises(WeightsError, match="another configuration"):
        trainer_of(tmp_path, STAGES[1:], other).resume()
    with pytest.raises(WeightsError, match="other stages than pretraining"):
        trainer_of(tmp_path, STAGES).resume()


def test_a_finished_run_goes_on_with_more_stages(tmp_path: Path) -> None:
    first, both = STAGES[1:2], STAGES[1:3]
    trainer_of(tmp_path, first).run()
    trainer = trainer_of(tmp_path, both)
    trainer.resume()
    reports: list[Progress] = []
    assert trainer.run(reports.append)
    assert {report.stage for report in reports} == {STAGES[2].name}
    assert trainer.taken == {stage.name: stage.steps for stage in both}
    with pytest.raises(WeightsError, match="other stages"):
        trainer_of(tmp_path, [STAGES[0], *STAGES[2:]]).resume()


def test_a_checkpoint_with_other_tensors_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.save()
    state = torch.load(trainer.checkpoint, weights_only=True)
    del state["model"]["occ_predictor.weight"]
    torch.save(state, trainer.checkpoint)
    with pytest.raises(WeightsError, match="another version of this program; start without --resume"):
        trainer_of(tmp_path).resume()


def test_a_checkpoint_from_before_a_field_was_added_is_resumed(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.save()
    state = torch.load(trainer.checkpoint, weights_only=True)
    assert '"pointer_distance_limit": 0, ' in state["config"]
    state["config"] = state["config"].replace('"pointer_distance_limit": 0, ', "")
    del state["stage_name"]
    torch.save(state, trainer.checkpoint)
    trainer_of(tmp_path, model=replace(SMALL, sam2=replace(SMALL.sam2, pointer_distance_limit=9))).resume()


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tmp_path: Path) -> None:
    stage = replace(STAGES[0], steps=110, warmup_steps=10, learning_rate=0.2, final_rate=0.1)
    trainer = trainer_of(tmp_path)
    rate = [trainer._learning_rate(stage, step) for step in range(111)]
    assert rate[0] == pytest.approx(0.02)
    assert rate[4] == pytest.approx(0.1)
    assert rate[9] == rate[10] == pytest.approx(0.2)
    assert rate[60] == pytest.approx(0.2 * (0.1 + 0.9 * 0.5))  # half way down
    assert rate[110] == pytest.approx(0.02)
    assert rate[10:] == sorted(rate[10:], reverse=True)


def test_the_optimiser_uses_the_rate_of_the_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [replace(STAGES[0], steps=2, warmup_steps=2)])
    trainer.run(until=-math.inf)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {STAGES[0].learning_rate / 2}


def test_a_gradient_that_is_not_finite_skips_its_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, [replace(STAGES[2], steps=1)])
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = math.inf
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.run()
    assert "not finite; the step is skipped" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in trainer.model.named_parameters())


def test_slower_parameters_learn_at_a_quarter_of_the_rate(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [replace(STAGES[1], slower=("seg_model.",))])
    rates = {id(p): group["share"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (0.25 if name.startswith("seg_model.") else 1.0)
    trainer.run()
    shares = {group["lr"] / group["share"] for group in trainer.optimizer.param_groups}
    assert shares == {trainer._learning_rate(STAGES[1], 1)}


def test_a_stage_hands_its_shares_to_its_clips() -> None:
    stage = replace(STAGES[1], absent_share=0.1, mirrored_share=0.3)
    plan = stage.clip_plan(stride=2)
    assert (plan.absent_share, plan.mirrored_share, plan.stride) == (0.1, 0.3, 2)
    assert {stage.mirrored_share for stage in tabletop_tiny_training().stages} == {0.5}


def test_the_shipped_schedule_has_pretraining_and_the_papers_three_stages() -> None:
    stages = tabletop_tiny_training().stages
    assert [stage.kind for stage in stages[:2]] == ["video", "pretraining"]
    papers = list(stages[2:])
    suffixes = re.compile("-(names|landmarks|short)$")
    order = list(dict.fromkeys(suffixes.sub("", stage.name) for stage in papers))
    assert order == ["alignment", "few-image", "propagation"]
    assert [stage.kind for stage in papers] == ["image"] * (len(papers) - 1) + ["propagation"]
    assert len({stage.name for stage in stages}) == len(stages)  # a resumed run finds its place by name
    assert ENCODER.startswith(papers[0].frozen)
    assert [name for stage in stages for name in stage.kinds if name not in KINDS_FULL] == []
    short = tabletop_tiny_training(0.001).stages
    assert [stage.steps for stage in short] == [max(1, round(stage.steps * 0.001)) for stage in stages]
