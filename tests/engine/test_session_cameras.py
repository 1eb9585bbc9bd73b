# SPDX-License-Identifier: Apache-2.0
"""Several cameras in one session: what they share, and what they must not."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.fakes import (
    BLUE,
    GREEN,
    RED,
    DelayedClient,
    FakeStages,
    InstantClient,
    ReusedBuffers,
    SilentClient,
    Square,
    Video,
    moving_square,
    small_config,
)
from virst_engine.backends.base import Stages
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.errors import BadFrame, BadGoal, BadPrompt, UnknownGoal
from virst_engine.model.config import sam2_1
from virst_engine.model.sam2 import Sam2
from virst_engine.session import Session
from virst_engine.slow.reasoner import NoReasoner
from virst_engine.types import ClickPrompt, Frame, FrameResult, ImageFeatures, MaskPrompt, MemoryTensors, ObjectState

LEFT = Video([moving_square(RED), moving_square(BLUE, row=7)])
RIGHT = Video([moving_square(RED, row=6), moving_square(GREEN, row=1)], start_ns=1_020_000_000)
VIDEOS = {"left": LEFT, "right": RIGHT}


def frame_of(camera: str, t: int) -> Frame:
    frame = VIDEOS[camera].frame(t)
    return Frame(frame.image_rgb_u8, frame.stamp_ns, camera)


def session_of(stages: Stages | None = None, **config: float | int) -> Session:
    clients = {camera: InstantClient() for camera in VIDEOS}
    return Session(small_config(**config), FakeStages() if stages is None else stages, clients)


def together(session: Session, t: int, cameras: Sequence[str] = ("left", "right")) -> list[FrameResult]:
    return session.step_together([frame_of(camera, t) for camera in cameras])


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def test_a_goal_of_all_cameras_is_found_in_each_with_the_same_ids() -> None:
    session = session_of()
    assert session.cameras == ("left", "right")
    goal = session.set_goal("red", object_id="ball")
    for t in range(30):
        results = together(session, t)
    assert [result.camera for result in results] == ["left", "right"]
    for result in results:
        (found,) = result.objects
        assert (found.object_id, found.instance_id, found.state) == ("ball", goal.instance_id, ObjectState.TRACKING)
        assert iou(found.mask, VIDEOS[result.camera].truth(29)) > 0.9


def test_a_goal_of_one_camera_costs_the_others_nothing() -> None:
    stages = FakeStages()
    session = session_of(stages)
    session.set_goal("red", camera="left")
    session.set_goal("green", camera="right", object_id="g")
    for t in range(5):
        left, right = together(session, t)
    assert [found.object_id for found in left.objects] == ["goal_1"]
    assert [found.object_id for found in right.objects] == ["g"]
    assert iou(right.objects[0].mask, RIGHT.truth(4, 1)) > 0.9
    assert stages.object_batches[-1] == 2  # one object of each camera, in one call


@pytest.mark.parametrize("stages", [FakeStages, ReusedBuffers])
def test_masks_are_those_of_sessions_of_their_own(stages: type[FakeStages]) -> None:
    both = session_of(stages())
    alone = {camera: Session(small_config(), stages(), InstantClient()) for camera in VIDEOS}
    for session in (both, *alone.values()):
        session.set_goal("red")
        session.set_goal("blue", object_id="second")
    for t in range(25):
        for result in together(both, t):
            expected = alone[result.camera].step(frame_of(result.camera, t))
            assert result.step == expected.step
            for found, wanted in zip(result.objects, expected.objects, strict=True):
                assert found.state is wanted.state
                assert np.array_equal(found.mask, wanted.mask)
                assert found.score == pytest.approx(wanted.score)


def test_one_call_of_each_stage_serves_all_cameras() -> None:
    stages = FakeStages()
    session = session_of(stages, period_s=100.0)
    session.set_goal("red")
    for t in range(3):
        together(session, t)
    before = dict(stages.calls)
    together(session, 3)
    assert {stage: stages.calls[stage] - before[stage] for stage in before} == dict.fromkeys(before, 1)


def test_cameras_may_come_one_by_one_in_any_order() -> None:
    session = session_of()
    session.set_goal("red")
    for t in range(12):
        for camera in ("right", "left") if t % 3 else ("left",):
            (result,) = together(session, t, [camera])
            assert result.objects[0].state is ObjectState.TRACKING
            assert iou(result.objects[0].mask, VIDEOS[camera].truth(t)) > 0.9


def test_what_one_camera_has_lost_another_still_sees() -> None:
    gone = Video([Square(RED, lambda t: (2, 2) if t < 5 else None)])
    session = session_of()
    goal = session.set_goal("red")
    for t in range(12):
        frame = gone.frame(t)
        left = Frame(frame.image_rgb_u8, frame.stamp_ns, "left")
        results = session.step_together([left, frame_of("right", t)])
    assert results[0].objects[0].state is not ObjectState.TRACKING
    assert results[1].objects[0].state is ObjectState.TRACKING
    assert session.goal_states() == {goal.goal_id: ObjectState.TRACKING}
    assert session.goal_states("left") == {goal.goal_id: results[0].objects[0].state}


def test_clearing_a_goal_leaves_the_others_as_they_are() -> None:
    session = session_of()
    first, second = session.set_goal("red"), session.set_goal("blue", camera="left")
    for t in range(5):
        together(session, t)
    session.clear_goal(first.goal_id)
    left, right = together(session, 5)
    assert [found.goal_id for found in left.objects] == [second.goal_id]
    assert left.objects[0].state is ObjectState.TRACKING
    assert right.objects == ()
    session.set_goal("green", replace=True, camera="right")
    left, right = together(session, 6)
    assert left.objects == ()
    assert [found.object_id for found in right.objects] == [session.goals()[0].object_id]


def test_a_clock_that_goes_back_resets_that_camera_only() -> None:
    session = session_of(period_s=100.0)
    session.set_goal("red")
    for t in range(10, 15):
        together(session, t)
    again, ahead = session.step_together([frame_of("left", 0), frame_of("right", 15)])
    anchors = [stream.tracker.memory.anchor_steps(0) for stream in session._streams.values()]
    assert anchors == [[again.step], [0]]
    assert ahead.objects[0].state is ObjectState.TRACKING


def test_a_reset_of_one_camera_leaves_the_other() -> None:
    session = session_of(period_s=100.0)
    session.set_goal("red")
    for t in range(3):
        together(session, t)
    session.reset("right")
    for _ in range(2):
        together(session, 3)
    assert [s.tracker.memory.anchor_steps(0) for s in session._streams.values()] == [[0], [3]]


def test_a_slow_reasoner_of_one_camera_holds_up_no_other() -> None:
    clients = {"left": DelayedClient(delay_steps=6), "right": InstantClient()}
    session = Session(small_config(), FakeStages(), clients)
    session.set_goal("red")
    states = []
    for t in range(12):
        clients["left"].tick()
        states.append([result.objects[0].state for result in together(session, t)])
    assert all(right is ObjectState.TRACKING for _, right in states)
    assert states[2][0] is ObjectState.SEARCHING
    assert states[-1][0] is ObjectState.TRACKING


def test_an_object_is_pointed_out_in_the_image_of_one_camera() -> None:
    session = Session(small_config(), FakeStages(), {camera: NoReasoner() for camera in VIDEOS})
    together(session, 0)
    at = np.argwhere(RIGHT.truth(0)).mean(axis=0)[::-1][None]
    with pytest.raises(BadPrompt, match="say in which camera's image it is; there are: left, right"):
        session.add_object(ClickPrompt(at))
    with pytest.raises(BadPrompt, match="there is no camera 'top'; there are: left, right"):
        session.add_object(ClickPrompt(at), camera="top")
    goal = session.add_object(ClickPrompt(at), camera="right")
    left, right = together(session, 1)
    assert goal.camera == "right"
    assert left.objects == ()
    assert iou(right.objects[0].mask, RIGHT.truth(1)) > 0.9
    with pytest.raises(UnknownGoal, match="objects that are set: none"):
        session.prompt_object(goal.object_id, ClickPrompt(at), camera="left")
    session.prompt_object(goal.object_id, ClickPrompt(at + 2), camera="right")


def test_frames_and_goals_of_other_cameras_are_refused() -> None:
    session = session_of()
    with pytest.raises(BadFrame, match="sees cameras left, right, got a frame of 'top'"):
        session.step(Frame(LEFT.frame(0).image_rgb_u8, 1, "top"))
    with pytest.raises(BadFrame, match="two frames of one camera"):
        session.step_together([frame_of("left", 0), frame_of("left", 1)])
    with pytest.raises(BadGoal, match="there is no camera 'top'; there are: left, right"):
        session.set_goal("red", camera="top")
    assert session.goals() == ()
    with pytest.raises(BadFrame):  # one bad frame: nothing has changed for the other
        session.step_together([frame_of("left", 0), Frame(np.zeros((0, 4, 3), np.uint8), 1, "right")])
    assert together(session, 0)[0].step == 0


def test_every_client_is_closed() -> None:
    clients = {camera: SilentClient() for camera in VIDEOS}
    with Session(small_config(), FakeStages(), clients) as session:
        together(session, 0)
    session.close()
    assert all(client.is_closed for client in clients.values())


def test_a_session_without_cameras_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one camera"):
        Session(small_config(), FakeStages(), {})


def test_objects_of_several_frames_are_conditioned_each_on_its_own() -> None:
    torch.manual_seed(0)
    stages = TorchStages(Sam2(sam2_1("tiny", 64)))
    features = stages.image_encoder(torch.randn(2, 3, 64, 64))
    m, grid, c = stages.sizes.memory_channels, stages.sizes.grid, stages.sizes.channels
    memory = MemoryTensors(
        torch.randn(3, 2, m, grid, grid),
        torch.tensor([[6, 0]]).expand(3, 2),
        torch.ones(3, 2, dtype=torch.bool),
        torch.randn(3, 4, c),
        torch.arange(4.0).expand(3, 4),
        torch.ones(3, 4, dtype=torch.bool),
    )
    together = stages.memory_attention(features, memory, torch.tensor([0, 1, 1]))
    for row, frame in enumerate([0, 1, 1]):
        alone = stages.memory_attention(
            ImageFeatures(**{name: value[frame : frame + 1] for name, value in vars(features).items()}),
            MemoryTensors(**{name: value[row : row + 1] for name, value in vars(memory).items()}),
        )
        assert torch.allclose(together[row], alone[0], atol=1e-4)


@pytest.mark.parametrize("cameras", [("",), ("left", "right")])
def test_warming_up_changes_nothing_that_is_seen(cameras: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    stages = TorchStages(Sam2(sam2_1("tiny", 64)))
    logits = []
    for is_warm in (False, True):
        with Session(small_config(), stages, {camera: NoReasoner() for camera in cameras}) as session:
            if is_warm:
                session.warm_up()
            names = [camera or "camera" for camera in cameras]
            session.step_together([frame_of_size(name, 0) for name in names])
            mask = np.zeros((64, 64), bool)
            mask[20:40, 20:40] = True
            session.add_object(MaskPrompt(mask), camera=cameras[-1])
            for t in range(1, 4):
                session.step_together([frame_of_size(name, t) for name in names])
            sighting = session._streams[cameras[-1]].tracker.sighting(0)
            assert sighting is not None
            logits.append(sighting.mask_logits)
    assert torch.equal(*logits)


def frame_of_size(camera: str, t: int) -> Frame:
    pixels = np.random.default_rng(t).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Frame(pixels, 1_000_000_000 * (t + 1), camera)


def test_what_a_session_needs_is_allocated_when_it_is_warm() -> None:
    stages = TorchStages(Sam2(sam2_1("tiny", 64)))
    session = Session(small_config(), stages, {camera: NoReasoner() for camera in VIDEOS})
    session.warm_up()
    for stream in session._streams.values():
        assert set(stream.tracker.ring._buffers) == {"top", "high_res_s0", "high_res_s1"}
        assert stream.tracker.ring.oldest_step() == -1
        assert stream.tracker.memory.is_empty(0)
