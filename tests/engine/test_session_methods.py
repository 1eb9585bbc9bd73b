# SPDX-License-Identifier: Apache-2.0
"""The methods `visa` and `tempvrs` in the closed loop: what they are sent, and what their few prompts become."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine.model.small_models import SMALL, small_virst
from tests.engine.model.test_window_methods import LANGUAGE, TEMPVRS, VIDEO, VISA, small
from tests.fakes import COLOURS, RED, FakeStages, Square, Video, moving_square, prompts_for, small_config
from virst_engine.config import METHOD_WINDOWS, ModelParameters, ReasonerParameters
from virst_engine.errors import BadGoal, WeightsError
from virst_engine.model.methods import save_method
from virst_engine.session import Session
from virst_engine.slow.reasoner import DelayedClient, InProcessClient
from virst_engine.types import ObjectState, Prompt, ReasonerAnswer
from virst_engine.weights import (
    load_goal_check,
    load_reasoner,
    load_stages,
    reasoner_identity,
    save_model,
    weights_sha256,
)

FRAMES, SPACING_S = METHOD_WINDOWS["visa"]


def config(method="visa", **changes):
    base = small_config(**changes)
    return replace(base, reasoner=replace(base.reasoner, method=method))


class ChoosingReasoner:
    """Finds colours as the fake reasoner does, but answers only for the frames of the clip at `positions`."""

    def __init__(self, *positions):
        self.positions, self.requests = positions, []

    def answer(self, request):
        self.requests.append(request)
        colour = COLOURS.get(request.sentence, (-9.0, -9.0, -9.0))
        prompts = prompts_for(request.clip, colour)
        chosen = {prompts[i].step: prompts[i] for i in self.positions}
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, tuple(chosen.values()))


def overlap(mask, truth):
    return np.count_nonzero(mask & truth) / max(np.count_nonzero(mask | truth), 1)


@pytest.mark.parametrize("method", ["visa", "tempvrs"])
def test_a_method_is_sent_its_own_window_and_no_features(method):
    video = Video([moving_square(RED)], period_s=0.05)
    reasoner = ChoosingReasoner(-1)
    with Session(config(method, period_s=0.5), FakeStages(), InProcessClient(reasoner)) as session:
        session.set_goal("red")
        for t in range(60):
            session.step(video.frame(t))
    clip = reasoner.requests[-1].clip
    assert len(clip.steps) == FRAMES
    np.testing.assert_allclose(np.diff(clip.stamps_ns) / 1e9, SPACING_S, atol=0.051)
    assert clip.fusion.shape == (FRAMES, 1, 1, 1)


def test_a_prompt_for_an_older_frame_is_decoded_there_and_replayed_to_now():
    video = Video([moving_square(RED)])
    reasoner = ChoosingReasoner(5)
    with Session(config(period_s=1000.0, retry_s=1000.0), FakeStages(), InProcessClient(reasoner)) as session:
        for t in range(30):
            session.step(video.frame(t))
        session.set_goal("red")
        for t in range(30, 50):
            (found,) = session.step(video.frame(t)).objects
    assert len(reasoner.requests) == 1
    assert found.state is ObjectState.TRACKING
    assert overlap(found.mask, video.truth(49)) > 0.8


def test_a_target_that_has_left_is_known_from_the_frame_that_was_chosen():
    """The newest frame does not show it: an answer about an older one finds it as lost, and memory finds it again."""
    video = Video([Square(RED, lambda t: None if 25 <= t < 45 else (2, 3))])
    reasoner = ChoosingReasoner(2)
    with Session(config(period_s=1000.0, retry_s=1000.0), FakeStages(), InProcessClient(reasoner)) as session:
        for t in range(30):
            session.step(video.frame(t))
        session.set_goal("red")
        states, masks = [], []
        for t in range(30, 60):
            (found,) = session.step(video.frame(t)).objects
            states.append(found.state)
            masks.append(found.mask)
    assert not any(mask.any() for mask in masks[3:14])
    assert ObjectState.LOST in states[:14]
    assert states[-1] is ObjectState.TRACKING
    assert overlap(masks[-1], video.truth(59)) > 0.8


def test_all_nodes_of_an_answer_become_anchors():
    """VIRST's clip has a prompt a frame, of which some are chosen; these methods have chosen already."""
    video = Video([moving_square(RED)])
    anchors = {}
    for positions in ((-1,), (0, 6, 9, 15, 21)):
        session = Session(config("tempvrs"), FakeStages(), InProcessClient(ChoosingReasoner(*positions)))
        with session:
            for t in range(25):
                session.step(video.frame(t))
            session.set_goal("red")
            for t in range(25, 32):
                session.step(video.frame(t))
            (stream,) = session._streams.values()
            (track,) = stream._tracks.values()
            anchors[positions] = len(stream.tracker._memory.anchor_steps(track.slot))
    assert anchors == {(-1,): 1, (0, 6, 9, 15, 21): 5}


def test_a_late_answer_is_decoded_on_the_frame_that_it_chose():
    video = Video([moving_square(RED)])
    client = DelayedClient(ChoosingReasoner(15), 0.45)
    with Session(config(retry_s=0.3), FakeStages(), client) as session:
        session.set_goal("red")
        for t in range(40):
            client.advance(video.frame(t).stamp_ns)
            (found,) = session.step(video.frame(t)).objects
    assert overlap(found.mask, video.truth(39)) > 0.8


class TestFiles:
    """Real networks at small widths, from files, in the stream and in the evaluation's place."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[ModelParameters, dict[str, Path]]:
        virst = small_virst(replace(SMALL, video=VIDEO, language=LANGUAGE))
        save_model(virst, tmp_path / "small.safetensors")
        model = ModelParameters(weights=str(tmp_path / "small.safetensors"), threads=1)
        of = {"segmenter": weights_sha256(model)}
        paths = {"visa": tmp_path / "visa.safetensors", "tempvrs": tmp_path / "tempvrs.safetensors"}
        save_method(small(replace(VISA, window_frames=FRAMES, **of)), paths["visa"])
        save_method(small(replace(TEMPVRS, slow_frames=8, **of)), paths["tempvrs"])
        return model, paths

    @pytest.mark.parametrize("method", ["visa", "tempvrs"])
    def test_a_session_asks_the_reasoner_of_the_file(self, files, method) -> None:
        model, paths = files
        base = small_config(period_s=0.5, recent_frames=4, pointers=8)
        chosen = replace(base, model=model, reasoner=replace(base.reasoner, method=method, weights=str(paths[method])))
        reasoner = load_reasoner(model, method, str(paths[method]))
        answers = []

        class Noting:
            def answer(self, request):
                answers.append(reasoner.answer(request))
                return answers[-1]

        client = InProcessClient(Noting())
        video = Video([moving_square(RED)])
        with Session(chosen, load_stages(model), client) as session:
            session.set_goal("the red ball")
            results = [session.step(video.frame(t)) for t in range(12)]
        for result in results:
            assert not result.objects[0].message.startswith(("the reasoner's", "this reasoner", "the clip"))
        assert answers
        assert all(answer.prompts for answer in answers)

    def test_reasoner_and_segmenter_have_to_mean_the_same_file(self, files) -> None:
        model, paths = files
        names = {reasoner_identity(model)}
        names |= {reasoner_identity(model, method, str(path)) for method, path in paths.items()}
        assert len(names) == 3

    def test_a_reasoner_of_another_method_is_named(self, files) -> None:
        model, paths = files
        with pytest.raises(WeightsError, match=r"holds a reasoner of the method visa, reasoner\.method is tempvrs"):
            load_reasoner(model, "tempvrs", str(paths["visa"]))

    def test_a_reasoner_for_other_weights_is_refused(self, files, tmp_path) -> None:
        _, paths = files
        save_model(small_virst(replace(SMALL, video=VIDEO, language=LANGUAGE), seed=9), tmp_path / "other.safetensors")
        other = ModelParameters(weights=str(tmp_path / "other.safetensors"), threads=1)
        with pytest.raises(WeightsError, match="trained for other weights"):
            load_reasoner(other, "visa", str(paths["visa"]))

    def test_a_reasoner_of_another_window_is_refused(self, files, tmp_path) -> None:
        model, _ = files
        save_method(small(replace(VISA, segmenter=weights_sha256(model))), tmp_path / "short.safetensors")
        with pytest.raises(WeightsError, match="windows of 10 frames"):
            load_reasoner(model, "visa", str(tmp_path / "short.safetensors"))

    def test_a_file_that_is_missing_is_named_with_what_to_do(self, files) -> None:
        model, _ = files
        with pytest.raises(WeightsError, match=r"no file .*nowhere.*reasoner\.weights"):
            load_reasoner(model, "visa", "/nowhere")
        with pytest.raises(WeightsError, match="no reasoner"):
            load_reasoner(ModelParameters(name="sam2.1-tiny"), "visa")
        with pytest.raises(WeightsError, match=r"no reasoner of the method visa for sam2\.1-tiny"):
            load_goal_check(ModelParameters(name="sam2.1-tiny"), "visa")

    def test_goals_are_checked_with_the_words_of_the_file(self, files) -> None:
        model, paths = files
        check = load_goal_check(model, "visa", str(paths["visa"]))
        check("the red ball")
        with pytest.raises(BadGoal, match="'teapot'"):
            check("the teapot")


def test_the_window_of_a_method_does_not_follow_clip_frames():
    chosen = ReasonerParameters(method="visa", clip_frames=3, clip_spacing_s=5.0)
    assert (chosen.frames_asked, chosen.spacing_asked_s) == METHOD_WINDOWS["visa"]
    assert chosen.chooses_frames
    assert not chosen.reads_features
    own = ReasonerParameters(clip_frames=3, clip_spacing_s=5.0)
    assert (own.frames_asked, own.spacing_asked_s, own.chooses_frames, own.reads_features) == (3, 5.0, False, True)


class BoxReasoner:
    """A detector answers where another method was asked for."""

    def answer(self, request):
        clip = request.clip
        boxes = np.array([[0.1, 0.1, 0.4, 0.4]], np.float32)
        prompt = Prompt.of_boxes(int(clip.steps[-1]), int(clip.stamps_ns[-1]), boxes)
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, (prompt,))


@pytest.mark.parametrize(("method", "reasoner"), [("visa", BoxReasoner()), ("grounding", ChoosingReasoner(-1))])
def test_an_answer_of_another_method_is_told(method, reasoner):
    video = Video([moving_square(RED)])
    with Session(config(method), FakeStages(), InProcessClient(reasoner)) as session:
        session.set_goal("red")
        session.step(video.frame(0))
        (found,) = session.step(video.frame(1)).objects
    assert "another method" in found.message
