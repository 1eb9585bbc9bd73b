# SPDX-License-Identifier: Apache-2.0
"""What the prompts of a sentence may depend on, and what they must not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.model.small_models import SMALL, small_virst, with_fusion
from virst_engine.model.config import VirstConfig
from virst_engine.model.video_language import VisualTokens
from virst_engine.model.virst import ClipEncoding, PromptOutput, Virst
from virst_engine.model.words import ANSWER, END, SPECIAL_TOKENS, WordTokenizer, pad_rows

T, N, C = 5, SMALL.fusion.st_tokens, SMALL.sam2.channels
PER_FRAME = replace(SMALL.language, position_per_frame=True)
SENTENCES = ("the red ball", "the big blue box left of the can", "the can")


@pytest.fixture(autouse=True)
def _no_gradients() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def model() -> Virst:
    return small_virst()


@pytest.fixture
def clips(model: Virst) -> ClipEncoding:
    return encode(model, clips=2)


def encode(model: Virst, clips: int, seed: int = 5) -> ClipEncoding:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(clips, T, 3, 64, 64, generator=generator)
    return model.encode_clip(frames, torch.randn(clips, T, C, 16, 16, generator=generator))


def rows_of(*sentences: str) -> tuple[Tensor, Tensor]:
    tokenizer = WordTokenizer(SMALL.words)
    return pad_rows([tokenizer.encode(sentence) for sentence in sentences], left=True)


def ask(model: Virst, clips: ClipEncoding, sentence: str, clip: int = 0) -> PromptOutput:
    return model.prompts(clips, torch.tensor([clip]), *rows_of(sentence))


def test_every_frame_of_the_clip_gets_n_prompts(model: Virst, clips: ClipEncoding) -> None:
    output = ask(model, clips, SENTENCES[0])
    assert output.prompts.shape == (1, T, N, C)
    assert output.projected.shape == (1, N, C)
    assert output.attention_logits is not None
    assert output.attention_logits.shape == (1, SMALL.fusion.heads, N, T, T, 2, 2)
    assert output.answer_logits is None


def test_st_tokens_stand_after_sentence_and_video_and_are_read_at_their_own_places(
    model: Virst, clips: ClipEncoding
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.language_model.register_forward_hook(
        lambda _module, _args, given, out: seen.append((given["inputs_embeds"], out.last_hidden_state)),
        with_kwargs=True,
    )
    output = ask(model, clips, SENTENCES[0])
    hook.remove()
    (embeddings, hidden), text = seen[0], model.language_model.embed_tokens(rows_of(SENTENCES[0])[0])
    words, visual = text.shape[1], clips.visual.tokens.shape[1]
    assert embeddings.shape[1] == words + visual + N
    assert torch.equal(embeddings[:, :words], text)
    assert torch.equal(embeddings[:, words:-N], clips.visual.tokens[:1])
    assert clips.initial_tokens is not None
    fused = model.initial_seg_fusion_module(model.st_embedding[None], clips.initial_tokens[:1])
    assert torch.allclose(embeddings[:, -N:], fused, atol=1e-6)
    assert torch.allclose(output.projected, model.seg_prompter.seg_proj(hidden[:, -N:]), atol=1e-6)


def test_the_answer_teaches_but_does_not_change_the_prompts(model: Virst, clips: ClipEncoding) -> None:
    text, valid = rows_of(SENTENCES[0])
    row = torch.tensor([0])
    without = model.prompts(clips, row, text, valid)
    for words in ([5], [6, 7, 8]):
        answer, answer_valid = pad_rows([[ANSWER, *words, END]])
        given = model.prompts(clips, row, text, valid, answer, answer_valid)
        assert torch.allclose(given.prompts, without.prompts, atol=1e-5)


def test_answer_logits_are_those_of_the_next_token(model: Virst, clips: ClipEncoding) -> None:
    text, valid = rows_of(SENTENCES[0])
    row = torch.tensor([0])

    def logits_of(*words: int) -> Tensor:
        answer, answer_valid = pad_rows([[ANSWER, *words, END]])
        logits = model.prompts(clips, row, text, valid, answer, answer_valid).answer_logits
        assert logits is not None
        assert logits.shape == (1, 2 + len(words), len(SMALL.words) + SPECIAL_TOKENS)
        return logits[0]

    one, other = logits_of(5, 6), logits_of(5, 9)
    # Entry i is computed from what stands before token i: the answers differ at token 2, so at entry 3 first.
    assert torch.allclose(one[:3], other[:3], atol=1e-5)
    assert not torch.allclose(one[3], other[3], atol=1e-3)
    assert not torch.allclose(one[0], one[1], atol=1e-3)


def test_padding_of_the_sentence_changes_nothing(model: Virst, clips: ClipEncoding) -> None:
    text, valid = rows_of(*SENTENCES)
    assert not bool(valid.all())
    together = model.prompts(clips, torch.tensor([0, 1, 0]), text, valid)
    for row, (sentence, clip) in enumerate(zip(SENTENCES, (0, 1, 0), strict=True)):
        alone = ask(model, clips, sentence, clip)
        assert torch.allclose(together.prompts[row : row + 1], alone.prompts, atol=1e-5)
        assert torch.allclose(together.projected[row : row + 1], alone.projected, atol=1e-5)


def test_what_stands_in_the_padding_does_not_matter(model: Virst, clips: ClipEncoding) -> None:
    text, valid = rows_of(*SENTENCES)
    rows = torch.tensor([0, 0, 0])
    garbage = torch.where(valid, text, 7)
    assert torch.allclose(
        model.prompts(clips, rows, text, valid).prompts, model.prompts(clips, rows, garbage, valid).prompts, atol=1e-5
    )


def test_each_row_reads_its_own_clip(model: Virst, clips: ClipEncoding) -> None:
    text, valid = rows_of(SENTENCES[0], SENTENCES[0], SENTENCES[0])
    prompts = model.prompts(clips, torch.tensor([1, 0, 1]), text, valid).prompts
    assert torch.allclose(prompts[0], prompts[2], atol=1e-5)
    assert not torch.allclose(prompts[0], prompts[1], atol=1e-2)
    second_alone = ClipEncoding(
        VisualTokens(clips.visual.tokens[1:], clips.visual.begins),
        None if clips.initial_tokens is None else clips.initial_tokens[1:],
        clips.second_maps[1:],
    )
    assert torch.allclose(ask(model, second_alone, SENTENCES[0]).prompts, prompts[:1], atol=1e-5)


def test_other_words_and_another_order_give_other_prompts(model: Virst, clips: ClipEncoding) -> None:
    one = ask(model, clips, "the red box left of the blue ball").prompts
    for sentence in ("the blue box left of the red ball", "the red box", "the big box left of the blue ball"):
        assert not torch.allclose(ask(model, clips, sentence).prompts, one, atol=1e-3)


def test_every_view_of_the_clip_reaches_the_prompts(model: Virst, clips: ClipEncoding) -> None:
    before = ask(model, clips, SENTENCES[0]).prompts
    assert clips.initial_tokens is not None
    for changed in (
        replace(clips, visual=VisualTokens(clips.visual.tokens.flip(1), clips.visual.begins)),
        replace(clips, initial_tokens=clips.initial_tokens + 1.0),
        replace(clips, second_maps=clips.second_maps.flip(1)),
    ):
        assert not torch.allclose(ask(model, changed, SENTENCES[0]).prompts, before, atol=1e-4)


def test_initial_fusion_can_be_off() -> None:
    off, on = small_virst(with_fusion(initial_fusion=False)), small_virst()
    clip, same_clip = encode(off, 1), encode(on, 1)
    assert clip.initial_tokens is None
    closed = ask(off, clip, SENTENCES[0]).prompts
    assert not torch.allclose(closed, ask(on, same_clip, SENTENCES[0]).prompts, atol=1e-3)
    on.initial_seg_fusion_module.gate.zero_()
    assert torch.allclose(closed, ask(on, same_clip, SENTENCES[0]).prompts, atol=1e-6)


def test_one_shared_st_row_or_one_for_each_token() -> None:
    """The released checkpoint has one [ST] row for all N, the paper N; N equal rows are one shared row."""
    shared, apart = small_virst(with_fusion(shared_st_embedding=True)), small_virst()
    assert shared.st_embedding.shape == (1, SMALL.language.hidden)
    assert apart.st_embedding.shape == (N, SMALL.language.hidden)
    weights = apart.state_dict() | {"st_embedding": apart.st_embedding[:1]}
    shared.load_state_dict(weights)
    clip = encode(apart, 1)
    one_row = ask(shared, clip, SENTENCES[0]).prompts
    assert not torch.allclose(ask(apart, clip, SENTENCES[0]).prompts, one_row, atol=1e-3)
    apart.st_embedding.copy_(apart.st_embedding[:1].expand(N, -1))
    assert torch.allclose(ask(apart, clip, SENTENCES[0]).prompts, one_row, atol=1e-6)
    assert not torch.allclose(one_row[:, :, 0], one_row[:, :, 1], atol=1e-3)  # position still tells them apart


def test_the_second_fusion_is_given_sams_dense_positions() -> None:
    model, plain = small_virst(), small_virst(with_fusion(position_in_values=False))
    clip = encode(model, 1)
    with_position = ask(model, clip, SENTENCES[0]).prompts
    assert not torch.allclose(with_position, ask(plain, clip, SENTENCES[0]).prompts, atol=1e-3)
    model.seg_model.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(2.0)
    assert not torch.allclose(with_position, ask(model, clip, SENTENCES[0]).prompts, atol=1e-3)


def test_without_second_fusion_prompts_are_the_projected_tokens() -> None:
    model = small_virst(with_fusion(second_fusion=False))
    output = ask(model, encode(model, 1), SENTENCES[0])
    assert output.attention_logits is None
    assert torch.equal(output.prompts, output.projected[:, None].expand(-1, T, -1, -1))


def test_frames_of_the_language_models_view_are_numbered(model: Virst) -> None:
    """Two equal frames get different visual tokens."""
    frames = torch.randn(1, 1, 3, 64, 64).expand(1, 8, -1, -1, -1)
    tokens = model.encode_clip(frames, torch.randn(1, 8, C, 16, 16)).visual.tokens.unflatten(1, (8, -1))
    assert not torch.allclose(tokens[:, 0], tokens[:, 4], atol=1e-3)  # both are the first of their short clip
    newest = model.frame_embedding[:, -8:]  # numbered from the newest, which has the last row in every clip
    assert torch.allclose(tokens[:, 0] - newest[:, 0], tokens[:, 4] - newest[:, 4], atol=1e-5)
    alone = model.encode_clip(frames[:, :1], torch.randn(1, 1, C, 16, 16)).visual.tokens
    assert torch.allclose(alone - newest[:, 7], tokens[:, 0] - newest[:, 0], atol=1e-5)


def test_the_newest_frame_follows_in_detail() -> None:
    """After four tokens per frame come the newest frame's sixteen cells, at one position of their own."""
    model = small_virst(replace(SMALL, video=replace(SMALL.video, fine_newest=True), language=PER_FRAME))
    coarse = small_virst(replace(SMALL, language=PER_FRAME))
    coarse.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fine_")})
    frames, maps = torch.randn(1, T, 3, 64, 64), torch.randn(1, T, C, 16, 16)
    with torch.no_grad():
        clip, cells = model.encode_clip(frames, maps), model.video_encoder.cells(frames)
        assert torch.equal(clip.visual.tokens[:, : 4 * T], coarse.encode_clip(frames, maps).visual.tokens)
        fine = model.fine_projector(cells[:, -1]) + model.fine_place_embedding
        assert torch.equal(clip.visual.tokens[:, 4 * T :], fine)
        positions = model.question(
            torch.ones(1, 2, dtype=torch.long),
            torch.ones(1, 2, dtype=torch.bool),
            clip.visual,
            torch.zeros(1, N, SMALL.language.hidden),
        ).positions[0]
        expected = [0, 1, *(2 + t for t in range(T) for _ in range(4)), *16 * [2 + T], *(3 + T + n for n in range(N))]
        assert positions.tolist() == expected
        assert ask(model, clip, SENTENCES[0]).prompts.shape == (1, T, N, C)


def test_the_same_class_takes_the_full_size_by_configuration_alone() -> None:
    """All but the video encoder, which is VideoChat-Flash's at full size and another class."""
    with torch.device("meta"):
        full = Virst(VirstConfig())
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in full.named_children()}
    assert millions["language_model"] == pytest.approx(7069, abs=1)  # Qwen2-7B without its head, 151,647 words
    assert millions["seg_model"] == pytest.approx(224.4, abs=0.1)  # SAM 2.1 large
    assert millions["initial_seg_fusion_module"] == pytest.approx(54.1, abs=0.05)
    assert millions["seg_prompter"] == pytest.approx(4.80, abs=0.005)


def test_a_clip_of_too_many_frames_is_refused(model: Virst) -> None:
    longest = SMALL.video.max_frames
    cells = torch.randn(1, longest + 1, 16, 16)
    with pytest.raises(ValueError, match=f"at most {longest} frames"):
        model.encode_cells(cells, torch.randn(1, longest + 1, C, 16, 16))


class TestAnswerInWords:
    """Greedy decoding, word by word, on keys and values that were kept."""

    @pytest.fixture(params=["one position a token", "one position a frame"])
    def speaker(self, request: pytest.FixtureRequest) -> Virst:
        if request.param == "one position a token":
            return small_virst()
        return small_virst(replace(SMALL, video=replace(SMALL.video, fine_newest=True), language=PER_FRAME))

    @staticmethod
    def foretold(model: Virst, clip: ClipEncoding, sentence: str, tokens: list[int]) -> list[int]:
        """The likeliest word at each place of the answer and the one after it, in one teacher-forced pass."""
        text, valid = rows_of(sentence)
        answer, answer_valid = pad_rows([[*tokens, END]])
        logits = model.prompts(clip, torch.tensor([0]), text, valid, answer, answer_valid).answer_logits
        assert logits is not None
        words = torch.tensor([END, *range(SPECIAL_TOKENS, logits.shape[-1])])
        return words[logits[0][:, words].argmax(dim=1)].tolist()

    def test_word_by_word_is_what_one_teacher_forced_pass_foretells(self, speaker: Virst) -> None:
        longest, lengths = 7, []
        for sentence in SENTENCES:
            clip = encode(speaker, clips=1)
            tokens = speaker.answer_tokens(clip, rows_of(sentence)[0], longest)
            foretold = self.foretold(speaker, clip, sentence, tokens)
            assert foretold[: len(tokens)] == tokens
            assert len(tokens) == longest or foretold[len(tokens)] == END
            lengths.append(len(tokens))
        assert max(lengths) > 1

    @staticmethod
    def read(model: Virst, clip: ClipEncoding, sentence: str) -> Tensor:
        """What the first word of the answer is made from."""
        hidden: list[Tensor] = []
        hook = model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        model.answer_tokens(clip, rows_of(sentence)[0], 1)
        hook.remove()
        return hidden[0]

    def test_the_answer_depends_on_the_video_and_on_the_question(self, speaker: Virst) -> None:
        """With a head that tells two things that were read apart, they are answered with two words."""
        one, other = (encode(speaker, clips=1, seed=seed) for seed in (5, 6))
        for first, second in (
            ((one, SENTENCES[0]), (other, SENTENCES[0])),
            ((one, SENTENCES[0]), (one, SENTENCES[1])),
        ):
            one_read, other_read = (F.normalize(self.read(speaker, *each), dim=0) for each in (first, second))
            difference = one_read - other_read
            assert difference.norm() > 1e-3
            with torch.no_grad():
                speaker.lm_head.weight.zero_()
                speaker.lm_head.weight[SPECIAL_TOKENS] = difference
                speaker.lm_head.weight[SPECIAL_TOKENS + 1] = -difference
            words = [speaker.answer_tokens(clip, rows_of(sentence)[0], 1) for clip, sentence in (first, second)]
            assert words == [[SPECIAL_TOKENS], [SPECIAL_TOKENS + 1]]

    def test_the_answer_ends_at_end_and_after_the_longest(self, speaker: Virst) -> None:
        clip, (text, _) = encode(speaker, clips=1), rows_of(SENTENCES[0])
        with torch.no_grad():
            speaker.lm_head.weight.zero_()  # every word is as likely, the first one of them is taken
        assert speaker.answer_tokens(clip, text, 5) == []  # which is END
        hidden = self.read(speaker, clip, SENTENCES[0])
        with torch.no_grad():
            speaker.lm_head.weight[SPECIAL_TOKENS] = hidden
            speaker.lm_head.weight[ANSWER] = 2 * hidden  # likelier, but no word
        assert speaker.answer_tokens(clip, text, 1) == [SPECIAL_TOKENS]
        for longest in (1, 3):
            assert len(speaker.answer_tokens(clip, text, longest)) <= longest
