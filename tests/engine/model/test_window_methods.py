# SPDX-License-Identifier: Apache-2.0
"""VISA and TempVRS at toy scale: what their prompts may depend on, what they must not, and each part re-computed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.engine.model.small_models import SMALL, WORDS, liven, small_virst
from virst_engine.errors import WeightsError
from virst_engine.model.methods import load_method, read_method_config, save_method, start_from
from virst_engine.model.tempvrs import TempVrs, TempVrsConfig, clip_relevance
from virst_engine.model.visa import (
    PERCENTAGES,
    Visa,
    VisaConfig,
    likeliest_answers,
    reference_frames,
    target_frame,
)
from virst_engine.model.window import window_ages, window_cells
from virst_engine.model.words import WordTokenizer, pad_rows
from virst_engine.weights import save_model

C = 32
VIDEO = replace(SMALL.video, fine_newest=True)
LANGUAGE = replace(SMALL.language, position_per_frame=True)
VISA = VisaConfig(
    "small-visa", VIDEO, LANGUAGE, C, window_frames=10, references=4, sampler_hidden=16, sampler_heads=2, words=WORDS
)
TEMPVRS = TempVrsConfig("small-tempvrs", VIDEO, LANGUAGE, C, slow_frames=4, fast_between=2, top_k=2, words=WORDS)


@pytest.fixture(autouse=True)
def _no_gradients() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def small(config: VisaConfig | TempVrsConfig, seed: int = 0) -> Visa | TempVrs:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Visa(config) if isinstance(config, VisaConfig) else TempVrs(config)
    liven(model, seed)
    return model


@pytest.fixture(scope="module")
def visa() -> Visa:
    return small(VISA)


@pytest.fixture(scope="module")
def tempvrs() -> TempVrs:
    return small(TEMPVRS)


def rows_of(*sentences: str) -> tuple[Tensor, Tensor]:
    tokenizer = WordTokenizer(WORDS)
    return pad_rows([tokenizer.encode(sentence) for sentence in sentences], left=True)


def window(frames: int = 10, seed: int = 3) -> Tensor:
    return torch.randn(1, frames, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


class TestWindow:
    def test_frames_of_one_phase_are_a_clip_of_the_encoders_rate(self, visa: Visa) -> None:
        frames = window()
        cells = window_cells(visa, frames, 3)
        for phase in range(3):
            assert torch.equal(cells[:, phase::3], visa.video_encoder.cells(frames[:, phase::3]))

    def test_ages_count_in_frames_of_that_rate(self) -> None:
        assert window_ages(7, 3).tolist() == pytest.approx([2, 5 / 3, 4 / 3, 1, 2 / 3, 1 / 3, 0])

    def test_the_time_between_two_rows_is_their_weighted_mean(self, visa: Visa) -> None:
        table = visa.frame_embedding[0, :, 0]
        found = visa.time_embedding(torch.tensor([0.0, 1.0, 1.25]))[0, :, 0]
        assert torch.equal(found[0], table[-1])
        assert torch.equal(found[1], table[-2])
        assert torch.allclose(found[2], 0.75 * table[-2] + 0.25 * table[-3], atol=1e-6)

    def test_an_age_beyond_the_table_is_its_oldest_row(self, visa: Visa) -> None:
        table = visa.frame_embedding[0, :, 0]
        assert torch.equal(visa.time_embedding(torch.tensor([99.5]))[0, 0, 0], table[0])


class TestVisaChoosesFrames:
    def test_the_mean_of_the_answers_is_the_target_frame(self) -> None:
        answers = torch.tensor([[0.2, 0.4], [1.0, 1.0], [0.0, 0.0]])
        assert target_frame(answers, 11).tolist() == [3, 10, 0]

    def test_answers_are_quantiles_of_the_distribution(self) -> None:
        logits = torch.full((2, PERCENTAGES), -50.0)
        logits[0, 30] = 0.0
        logits[1, [20, 80]] = 0.0  # half of the answers each
        answers = likeliest_answers(logits, 10)
        assert answers[0].tolist() == pytest.approx([0.3] * 10)
        assert answers[1].tolist() == pytest.approx([0.2] * 5 + [0.8] * 5)

    def test_quantiles_have_the_mean_of_many_draws(self) -> None:
        logits = torch.randn(1, PERCENTAGES, generator=torch.Generator().manual_seed(0)) * 2
        mean = float((logits.softmax(-1) * torch.linspace(0, 1, PERCENTAGES)).sum())
        assert float(likeliest_answers(logits, 200).mean()) == pytest.approx(mean, abs=0.01)

    @pytest.mark.parametrize(
        ("sampling", "expected"),
        [("local", [2, 3, 5, 6]), ("global", [0, 3, 6, 9]), ("global-local", [0, 3, 5, 9])],
    )
    def test_references_lie_near_the_target_or_all_over_the_window(self, sampling: str, expected: list[int]) -> None:
        assert reference_frames(4, 10, 4, sampling) == expected

    @pytest.mark.parametrize("sampling", ["local", "global", "global-local"])
    @pytest.mark.parametrize("target", [0, 5, 9])
    def test_references_are_distinct_and_never_the_target(self, sampling: str, target: int) -> None:
        for count in range(12):
            found = reference_frames(target, 10, count, sampling)
            assert len(found) == len(set(found)) == min(count, 9)
            assert target not in found
            assert found == sorted(found)

    def test_the_sampler_reads_the_words_and_the_order_of_frames(self, visa: Visa) -> None:
        cells = visa.encode(window())
        first = visa.percentages(cells, *rows_of("the red ball"))
        assert first.shape == (1, PERCENTAGES)
        assert not torch.allclose(first, visa.percentages(cells, *rows_of("the blue box")), atol=1e-3)
        assert not torch.allclose(first, visa.percentages(cells.flip(1), *rows_of("the red ball")), atol=1e-3)

    def test_two_tokens_of_a_frame_then_the_words_are_what_the_sampler_reads(self, visa: Visa) -> None:
        """Recomputed, frame by frame: what each word sees in the cells, on average, and the mean of the cells."""
        cells, (text, valid) = visa.encode(window()), rows_of("the red ball")
        sampler, d = visa.sampler, cells.shape[-1]
        words = sampler.language_model.embed_tokens(text)[0]
        tokens = []
        for t in range(cells.shape[1]):
            frame = cells[0, t]
            seen = []
            for word in words:
                query = sampler.context_query.weight @ word + sampler.context_query.bias
                seen.append((frame @ query / d**0.5).softmax(0) @ frame)
            context = sampler.context.weight @ torch.stack(seen).mean(0) + sampler.context.bias
            content = sampler.content.weight @ frame.mean(0) + sampler.content.bias
            for kind, token in enumerate((context, content)):
                token = torch.nn.functional.layer_norm(token, token.shape, sampler.norm.weight, sampler.norm.bias)
                tokens.append(token + sampler.kind_embedding[kind] + sampler.time_embedding[t])
        sequence = torch.cat((torch.stack(tokens), words, sampler.question_embedding))[None]
        hidden = sampler.language_model(inputs_embeds=sequence, use_cache=False).last_hidden_state[0, -1]
        expected = sampler.percentage.weight @ hidden + sampler.percentage.bias
        assert torch.allclose(visa.percentages(cells, text, valid)[0], expected, atol=1e-4)

    @pytest.mark.parametrize(
        "part", ["content.weight", "context.weight", "context_query.weight", "kind_embedding", "time_embedding",
                 "question_embedding", "norm.weight"]
    )  # fmt: skip
    def test_no_part_of_the_sampler_can_be_left_out(self, part: str) -> None:
        visa = small(VISA)
        cells, words = visa.encode(window()), rows_of("the red ball")
        before = visa.percentages(cells, *words)
        visa.sampler.get_parameter(part).zero_()
        assert not torch.allclose(before, visa.percentages(cells, *words), atol=1e-3)

    def test_the_sampler_does_not_read_padding(self, visa: Visa) -> None:
        cells = visa.encode(window())
        text, valid = rows_of("the red ball", "the big blue box left of the can")
        both = visa.percentages(cells.expand(2, -1, -1, -1), text, valid)
        alone = visa.percentages(cells, *rows_of("the red ball"))
        assert torch.allclose(both[:1], alone, atol=1e-4)


class TestVisaPrompts:
    @staticmethod
    def ask(visa: Visa, cells: Tensor, target: int, references: list[int], sentence: str = "the red ball") -> Tensor:
        text, valid = rows_of(sentence)
        question = visa.question_about(cells, torch.tensor([target]), torch.tensor([references]), text, valid)
        return visa.prompts(question).prompts

    def test_the_prompt_is_an_mlp_of_the_state_that_foretells_seg(self, visa: Visa) -> None:
        """Recomputed: the hidden state one before the last query, Linear, ReLU, Linear."""
        cells, (text, valid) = visa.encode(window()), rows_of("the red ball")
        question = visa.question_about(cells, torch.tensor([6]), torch.tensor([[0, 3, 5, 9]]), text, valid)
        hidden = visa.language_model(
            inputs_embeds=question.embedded,
            attention_mask=question.valid.long(),
            position_ids=question.positions,
            use_cache=False,
        ).last_hidden_state[:, -2]
        first, second = visa.text_hidden_fcs[0], visa.text_hidden_fcs[2]
        expected = (hidden @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
        output = visa.prompts(question)
        assert torch.allclose(output.prompts[:, 0], expected, atol=1e-5)
        presence = expected @ visa.occ_predictor.weight.T + visa.occ_predictor.bias
        assert torch.allclose(output.presence_logits, presence[:, 0], atol=1e-5)

    def test_the_target_frame_is_shown_in_detail_after_all_frames_in_order(self, visa: Visa) -> None:
        cells, (text, valid) = visa.encode(window()), rows_of("the red ball")
        question = visa.question_about(cells, torch.tensor([4]), torch.tensor([[9, 0, 3, 5]]), text, valid)
        shown, words = [0, 3, 4, 5, 9], text.shape[1]
        times = visa.time_embedding(window_ages(10, 3))[0, :, 0]
        coarse = visa.coarse_tokens(cells[:, shown]) + times[shown][None, :, None]
        per_frame = coarse.shape[2]
        assert torch.allclose(question.embedded[:, words : words + 5 * per_frame], coarse.flatten(1, 2), atol=1e-5)
        fine = visa.fine_tokens(cells[:, 4]) + times[4] - times[9]
        assert torch.allclose(question.embedded[:, words + 5 * per_frame : -2], fine, atol=1e-5)
        positions = question.positions[0]
        assert positions[words : words + per_frame].unique().numel() == 1  # one position a frame
        assert int(positions[-1] - positions[words - 1]) == 5 + 1 + 2

    @pytest.mark.parametrize("changed", ["sentence", "target", "reference", "order"])
    def test_prompts_depend_on_everything_that_is_shown(self, visa: Visa, changed: str) -> None:
        cells = visa.encode(window())
        first = self.ask(visa, cells, 4, [0, 3, 5, 9])
        if changed == "sentence":
            other = self.ask(visa, cells, 4, [0, 3, 5, 9], "the blue box")
        elif changed == "target":
            other = self.ask(visa, cells, 6, [0, 3, 5, 9])
        elif changed == "reference":
            other = self.ask(visa, cells, 4, [0, 3, 6, 9])
        else:
            other = self.ask(visa, cells.flip(1), 5, [0, 4, 6, 9])  # the same frames, backwards
        assert not torch.allclose(first, other, atol=1e-3)

    def test_frames_that_are_not_shown_have_no_part(self, visa: Visa) -> None:
        cells = visa.encode(window())
        first = self.ask(visa, cells, 4, [0, 3, 5, 9])
        cells[:, [1, 2, 6, 7, 8]] += 1.0
        assert torch.equal(first, self.ask(visa, cells, 4, [0, 3, 5, 9]))

    def test_a_window_that_is_too_long_is_refused(self, visa: Visa) -> None:
        with pytest.raises(ValueError, match="at most 10 frames"):
            visa.encode(window(11))


class TestTempVrs:
    @staticmethod
    def ask(tempvrs: TempVrs, frames: Tensor, sentence: str = "the red ball") -> tuple[Tensor, Tensor]:
        text, valid = rows_of(sentence)
        output = tempvrs.prompts(tempvrs.question_about(tempvrs.encode(frames), text, valid))
        return output.prompts, output.relevance_logits

    def test_slow_and_fast_frames_are_interleaved_in_the_order_of_time(self, tempvrs: TempVrs) -> None:
        """Recomputed frame by frame: 4 tokens of a slow frame, their mean of a fast one, 16 details of the newest."""
        frames = window()
        visual = tempvrs.encode(frames)
        cells = window_cells(tempvrs, frames, 3)
        coarse, times = tempvrs.coarse_tokens(cells), tempvrs.time_embedding(window_ages(10, 3))[0, :, 0]
        place = 0
        for t in range(10):
            tokens = coarse[0, t] + times[t]
            if t % 3:
                tokens = tokens.mean(dim=0, keepdim=True)
            assert torch.allclose(visual.tokens[0, place : place + len(tokens)], tokens, atol=1e-5)
            assert bool(visual.begins[place]) == (t % 3 == 0)
            place += len(tokens)
        assert torch.allclose(visual.tokens[:, place:], tempvrs.fine_tokens(cells[:, -1]), atol=1e-5)
        assert visual.tokens.shape[1] == 4 * 4 + 6 * 1 + 16
        assert int(visual.begins.sum()) == 4 + 1

    def test_fast_tokens_are_means_of_neighbouring_places(self) -> None:
        video = replace(VIDEO, image_size=128)  # 4 x 4 tokens a frame
        model = small(replace(TEMPVRS, video=video))
        tokens = torch.arange(16.0)[None, :, None].expand(1, 16, 3)
        assert model._averaged(tokens)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]

    def test_tep_and_seg_are_read_at_their_own_places(self, tempvrs: TempVrs) -> None:
        text, valid = rows_of("the red ball")
        question = tempvrs.question_about(tempvrs.encode(window()), text, valid)
        hidden = tempvrs.language_model(
            inputs_embeds=question.embedded,
            attention_mask=question.valid.long(),
            position_ids=question.positions,
            use_cache=False,
        ).last_hidden_state
        output = tempvrs.prompts(question)
        told = hidden[:, -5]  # three layers by hand, GELU between them
        for number in (0, 2, 4):
            told = told @ tempvrs.tep_mlp[number].weight.T + tempvrs.tep_mlp[number].bias
            if number < 4:
                told = told * 0.5 * (1 + torch.erf(told / 2**0.5))
        assert torch.allclose(output.relevance_logits, told, atol=1e-5)
        first, second = tempvrs.text_hidden_fcs[0], tempvrs.text_hidden_fcs[2]
        prompts = (hidden[:, -4:] @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
        assert torch.allclose(output.prompts[:, :, 0], prompts, atol=1e-5)
        assert output.relevance_logits.shape == (1, 4)

    def test_each_clip_has_a_seg_of_its_own_with_its_time(self, tempvrs: TempVrs) -> None:
        text, valid = rows_of("the red ball")
        question = tempvrs.question_about(tempvrs.encode(window()), text, valid)
        times = tempvrs.frame_embedding[0, -4:, 0]
        assert torch.allclose(question.embedded[0, -4:], tempvrs.seg_embedding + times, atol=1e-5)
        assert torch.allclose(question.embedded[0, -5], tempvrs.tep_embedding[0], atol=1e-6)

    def test_one_seg_serves_all_clips_where_that_is_chosen(self) -> None:
        model = small(replace(TEMPVRS, several_seg=False))
        prompts, _ = self.ask(model, window())
        assert prompts.shape == (1, 4, 1, C)
        assert torch.equal(prompts, prompts[:, :1].expand(-1, 4, -1, -1))

    def test_relevance_of_frames_becomes_that_of_clips(self) -> None:
        logits = torch.arange(10.0)[None]
        assert clip_relevance(logits, 4, 3)[0].tolist() == [0, 2, 5, 8]
        assert torch.equal(clip_relevance(logits[:, :4], 4, 3), logits[:, :4])
        _, relevance = self.ask(small(replace(TEMPVRS, supervision="frame")), window())
        assert relevance.shape == (1, 10)

    @pytest.mark.parametrize("frame", [0, 1, 5, 9])
    def test_every_frame_counts_and_so_do_the_words(self, tempvrs: TempVrs, frame: int) -> None:
        frames = window()
        prompts, relevance = self.ask(tempvrs, frames)
        others = frames.clone()
        others[:, frame] = window(seed=8)[:, 0]
        for changed in (self.ask(tempvrs, others), self.ask(tempvrs, frames, "the blue box")):
            assert not torch.allclose(prompts, changed[0], atol=1e-4)
            assert not torch.allclose(relevance, changed[1], atol=1e-4)

    def test_a_window_of_another_length_is_refused(self, tempvrs: TempVrs) -> None:
        with pytest.raises(ValueError, match="a window has 10 frames, got 7"):
            tempvrs.encode(window(7))


class TestFiles:
    @pytest.mark.parametrize("config", [VISA, TEMPVRS], ids=["visa", "tempvrs"])
    def test_what_is_saved_is_loaded(self, config: VisaConfig | TempVrsConfig, tmp_path) -> None:
        model = small(replace(config, segmenter="abc"))
        save_method(model, tmp_path / "m.safetensors")
        assert read_method_config(tmp_path / "m.safetensors") == model.config
        loaded = load_method(tmp_path / "m.safetensors")
        assert type(loaded) is type(model)
        for name, value in model.state_dict().items():
            assert torch.allclose(loaded.state_dict()[name].float(), value.float(), atol=2e-3), name

    def test_the_models_own_weights_are_no_reasoner_of_another_method(self, tmp_path) -> None:
        save_model(small_virst(), tmp_path / "virst.safetensors")
        with pytest.raises(WeightsError, match="format virst-weights-1, wanted virst-reasoner-1"):
            load_method(tmp_path / "virst.safetensors")

    def test_a_method_that_this_version_does_not_know_is_named(self, visa: Visa, tmp_path) -> None:
        from safetensors.torch import save_file

        metadata = {"format": "virst-reasoner-1", "method": "oracle", "config": visa.config.to_json(), "card": "{}"}
        save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", metadata)
        with pytest.raises(WeightsError, match="the method 'oracle'"):
            load_method(tmp_path / "m.safetensors")

    def test_a_tensor_that_is_missing_is_named(self, visa: Visa, tmp_path) -> None:
        from safetensors.torch import save_file

        state = {name: value for name, value in visa.state_dict().items() if name != "seg_embedding"}
        metadata = {"format": "virst-reasoner-1", "method": "visa", "config": visa.config.to_json(), "card": "{}"}
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "m.safetensors", metadata)
        with pytest.raises(WeightsError, match="lacks 1 tensors, for example seg_embedding"):
            load_method(tmp_path / "m.safetensors")

    def test_a_reasoner_goes_on_from_what_virst_has_learnt(self) -> None:
        virst = small_virst(replace(SMALL, video=VIDEO, language=LANGUAGE), seed=4)
        for model in (small(VISA), small(TEMPVRS)):
            start_from(model, virst)
            for name in ("mm_projector.0.weight", "frame_embedding", "language_model.norm.weight", "lm_head.weight"):
                assert torch.equal(model.state_dict()[name], virst.state_dict()[name])
            assert torch.equal(model.seg_embedding[0], virst.st_embedding[0])


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        (VISA, {"sampling": "all"}, "sampling"),
        (VISA, {"window_frames": 1000}, "2 to 48 frames"),
        (VISA, {"window_frames": 1}, "2 to 48 frames"),
        (VISA, {"references": 0}, "references"),
        (VISA, {"answers": 0}, "answers"),
        (VISA, {"phases": 0}, "phases"),
        (VISA, {"video": SMALL.video}, "fine_newest"),
        (TEMPVRS, {"video": SMALL.video}, "fine_newest"),
        (TEMPVRS, {"slow_frames": 0}, "slow_frames"),
        (TEMPVRS, {"fast_pool": 0}, "fast_pool"),
        (TEMPVRS, {"fast_between": -1}, "fast_between"),
        (TEMPVRS, {"slow_frames": 40}, "2 to 48 frames"),
        (TEMPVRS, {"supervision": "none"}, "supervision"),
        (TEMPVRS, {"top_k": 5}, "top_k must be 1 to 4"),
        (TEMPVRS, {"fast_pool": 3}, "does not divide"),
    ],
)
def test_dimensions_that_make_no_sense_are_refused(
    config: VisaConfig | TempVrsConfig, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        replace(config, **changes)


@pytest.mark.parametrize("config", [VISA, TEMPVRS], ids=["visa", "tempvrs"])
def test_a_configuration_survives_json(config: VisaConfig | TempVrsConfig) -> None:
    assert type(config).from_json(config.to_json()) == config
