# SPDX-License-Identifier: Apache-2.0
"""A detector's boxes in the closed loop: from a sentence to a track and its loss; in the process and by wire."""

import time
from dataclasses import replace

import numpy as np
import pytest

from tests.fakes import GREEN, RED, FakeReasoner, FakeStages, Square, Video, moving_square, small_config
from virst_engine.config import ModelParameters
from virst_engine.session import Session
from virst_engine.slow.grounding_reasoner import IDENTITY, Detections, GroundingReasoner
from virst_engine.slow.reasoner import DelayedClient, InProcessClient
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.types import ObjectState, Prompt
from virst_engine.weights import load_goal_check, reasoner_identity, understands_sentences

SCALE = (3, 4)  # the camera's image is 96 x 128


def config(**changes):
    base = small_config(period_s=0.5, **changes)
    return replace(base, reasoner=replace(base.reasoner, method="grounding"))


class ColourDetector:
    """Finds the colour that the phrase names, where most of its pixels are; scores fall with its size."""

    threshold = 0.5

    def __init__(self, score=0.9):
        self.score, self.images = score, []

    def detect(self, image_rgb_u8, phrase):
        self.images.append(image_rgb_u8)
        colour = {"red": RED, "green": GREEN}.get(phrase.split()[0])
        if colour is None:
            return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
        near = np.abs(image_rgb_u8 / 255.0 - colour).sum(axis=2) < 0.5
        if not near.any():
            return Detections(np.array([[0.4, 0.4, 0.6, 0.6]], np.float32), np.array([0.05], np.float32))
        height, width = near.shape
        rows, columns = np.nonzero(near.any(axis=1))[0], np.nonzero(near.any(axis=0))[0]
        box = [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
        return Detections(np.array([box], np.float32), np.array([self.score], np.float32))


def overlap(found, video, t, square=0):
    truth = np.kron(video.truth(t, square), np.ones(SCALE, bool))
    return np.count_nonzero(found.mask & truth) / np.count_nonzero(found.mask | truth)


def run(session, video, frames):
    return [session.step(video.frame(t)).objects for t in frames]


def test_a_noun_phrase_is_tracked_from_its_first_frame_on():
    video = Video([moving_square(RED, row=2), moving_square(GREEN, row=10)], scale=SCALE)
    detector = ColourDetector()
    with Session(config(), FakeStages(), InProcessClient(GroundingReasoner(detector))) as session:
        session.set_goal("red square")
        session.set_goal("green square.")
        for t, objects in enumerate(run(session, video, range(15))):
            for square, found in enumerate(objects):
                if t:
                    assert found.state is ObjectState.TRACKING
                    assert overlap(found, video, t, square) > 0.8


def test_the_detector_sees_the_newest_frame_with_its_aspect_and_no_more_than_it_was_told():
    video = Video([moving_square(RED)], scale=SCALE)
    detector = ColourDetector()
    small = config()
    small = replace(small, reasoner=replace(small.reasoner, detector_side=64))
    sizes = {}
    for name, chosen in (("whole", config()), ("small", small)):
        with Session(chosen, FakeStages(), InProcessClient(GroundingReasoner(detector))) as session:
            session.set_goal("red")
            session.step(video.frame(0))
            sizes[name] = detector.images[-1].shape
    assert sizes == {"whole": (96, 128, 3), "small": (48, 64, 3)}
    np.testing.assert_array_equal(detector.images[0], video.frame(0).image_rgb_u8)


def test_a_camera_may_change_its_size():
    video = Video([moving_square(RED)], scale=SCALE)
    with Session(config(), FakeStages(), InProcessClient(GroundingReasoner(ColourDetector()))) as session:
        session.set_goal("red")
        run(session, video, range(4))
        for t in range(4, 12):
            (found,) = session.step(video.frame(t, scale=(2, 2))).objects
        assert found.mask.shape == (64, 64)
        assert found.mask.any()


def test_a_late_answer_is_decoded_on_its_own_frame_and_replayed():
    video = Video([moving_square(RED)], scale=SCALE)
    client = DelayedClient(GroundingReasoner(ColourDetector()), 0.35)
    with Session(config(), FakeStages(), client) as session:
        session.set_goal("red")
        for t in range(15):
            client.advance(video.frame(t).stamp_ns)
            (found,) = session.step(video.frame(t)).objects
            assert found.mask.any() == (t >= 5) or t in (4, 5)
        assert overlap(found, video, 14) > 0.8


def test_what_is_below_the_threshold_is_not_there():
    video = Video([moving_square(RED)], scale=SCALE)
    for sentence, detector in (
        ("green", ColourDetector()),
        ("red", ColourDetector(score=0.4)),
        ("cup", ColourDetector()),
    ):
        with Session(config(), FakeStages(), InProcessClient(GroundingReasoner(detector))) as session:
            session.set_goal(sentence)
            for (found,) in run(session, video, range(10)):
                assert not found.mask.any()
            assert found.state is ObjectState.NOT_FOUND


def test_a_goal_is_found_when_it_comes():
    video = Video([Square(RED, lambda t: (3, 3) if t >= 8 else None)], scale=SCALE)
    with Session(config(retry_s=0.1), FakeStages(), InProcessClient(GroundingReasoner(ColourDetector()))) as session:
        session.set_goal("red")
        seen = [found.mask.any() for (found,) in run(session, video, range(20))]
    assert not any(seen[:8])
    assert all(seen[12:])


def test_a_hidden_object_is_lost_and_comes_back():
    video = Video([Square(RED, lambda t: None if 6 <= t < 16 else (3, 3))], scale=SCALE)
    with Session(config(), FakeStages(), InProcessClient(GroundingReasoner(ColourDetector()))) as session:
        session.set_goal("red")
        states = [found.state for (found,) in run(session, video, range(24))]
    assert states[12] is ObjectState.LOST
    assert states[20] is ObjectState.TRACKING


def test_several_boxes_are_one_object():
    video = Video([Square(RED, lambda t: (1, 1)), Square(RED, lambda t: (10, 10))], scale=SCALE)

    class Both(ColourDetector):
        def detect(self, image_rgb_u8, phrase):
            boxes = [[2 / 32, 2 / 32, 10 / 32, 10 / 32], [20 / 32, 20 / 32, 28 / 32, 28 / 32]]
            return Detections(np.array(boxes, np.float32), np.array([0.9, 0.8], np.float32))

    with Session(config(), FakeStages(), InProcessClient(GroundingReasoner(Both(), most_boxes=2))) as session:
        session.set_goal("red")
        objects = run(session, video, range(4))[-1]
    assert overlap(objects[0], video, 3, 0) > 0.4  # half of it is the other one
    assert overlap(objects[0], video, 3, 1) > 0.4


@pytest.mark.parametrize("asked", ["grounding", "virst"])
def test_a_reasoner_of_another_method_is_told_apart(asked):
    video = Video([moving_square(RED)], scale=SCALE)
    reasoner = FakeReasoner() if asked == "grounding" else GroundingReasoner(ColourDetector())
    with Session(
        config() if asked == "grounding" else small_config(), FakeStages(), InProcessClient(reasoner)
    ) as session:
        session.set_goal("red")
        (found,) = session.step(video.frame(0)).objects
    assert "another method" in found.message
    assert f"reasoner.method is {asked}" in found.message
    assert not found.mask.any()


@pytest.mark.parametrize("boxes", [np.full((1, 4), np.nan), np.zeros((0, 4)), np.zeros((1, 3))])
def test_boxes_that_make_no_sense_are_told(boxes):
    class Wrong(GroundingReasoner):
        def answer(self, request):
            answer = super().answer(request)
            return replace(answer, prompts=(Prompt(0, 0, np.zeros((0, 0), np.float32), 1.0, boxes.astype(np.float32)),))

    with Session(config(), FakeStages(), InProcessClient(Wrong(ColourDetector()))) as session:
        session.set_goal("red")
        try:
            (found,) = session.step(Video([moving_square(RED)]).frame(0)).objects
        except TypeError:
            assert boxes.shape[1] != 4  # the tests' own check of shapes
            return
    assert "boxes make no sense" in found.message


def test_any_model_understands_by_a_detector():
    model = ModelParameters(name="sam2.1-tiny")
    assert not understands_sentences(model)
    assert understands_sentences(model, "grounding")
    assert reasoner_identity(model, "grounding") == IDENTITY
    load_goal_check(model, "grounding")("a red cup")


def test_over_the_wire(tmp_path):
    import threading

    from virst_engine.slow.zmq_server import ReasonerServer

    address = f"ipc://{tmp_path}/reasoner"
    video = Video([moving_square(RED)], scale=SCALE)
    with ReasonerServer(address, model=IDENTITY) as server:
        thread = threading.Thread(target=server.run, args=(GroundingReasoner(ColourDetector()),), daemon=True)
        thread.start()
        client = ZmqReasonerClient(address, model=IDENTITY, heartbeat_s=0.05)
        with Session(config(), FakeStages(), client) as session:
            session.set_goal("red square")
            end_s, t, found = time.monotonic() + 30, 0, None
            while time.monotonic() < end_s and (found is None or not found.mask.any()):
                (found,) = session.step(video.frame(t)).objects
                t += 1
                time.sleep(0.02)
            assert found is not None
            assert overlap(found, video, t - 1) > 0.8
        server.stop()
        thread.join(10)
