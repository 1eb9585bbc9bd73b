# SPDX-License-Identifier: Apache-2.0
"""Goals that are split into their single objects, closed loop."""

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from tests.engine.local_stages import LocalStages, place, red_square, truths
from tests.fakes import BLUE, RED, DelayedClient, FakeReasoner, InstantClient, Square, Video, small_config
from virst_engine.errors import BadGoal, UnknownGoal
from virst_engine.fast.postprocess import instance_map
from virst_engine.fast.tracker import Sighting
from virst_engine.instance_tracks import InstanceTracks
from virst_engine.session import Session
from virst_engine.types import ClickPrompt, Frame, FrameResult, MaskPrompt, ObjectResult, ObjectState, ReasonerRequest

TRACKING, LOST = ObjectState.TRACKING, ObjectState.LOST
TWO_REDS = Video([red_square(3, 2), red_square(9, 11)])


def session_of(client: InstantClient | None = None, **config: float | int) -> Session:
    changes = {"max_objects": 5, "instance_steps": 4, **config}
    return Session(small_config(**changes), LocalStages(), InstantClient() if client is None else client)


def run(session: Session, video: Video, frames: Sequence[int]) -> list[FrameResult]:
    return [session.step(video.frame(t)) for t in frames]


def parts(result: FrameResult) -> dict[str, ObjectResult]:
    return {found.object_id: found for found in result.objects if found.part_of}


def by_place(result: FrameResult, masks: Sequence[np.ndarray]) -> list[str]:
    """The object id of the instance at each place; empty where none is."""
    found = parts(result)
    return [
        next((name for name, each in found.items() if (each.mask & mask).sum() > 0.5 * mask.sum()), "")
        for mask in masks
    ]


def test_the_union_stays_and_each_part_of_it_becomes_an_object() -> None:
    session = session_of()
    goal = session.set_goal("red", object_id="reds", max_instances=4)
    results = run(session, TWO_REDS, range(10))
    assert [len(result.objects) for result in results] == [1] * 3 + [3] * 7
    union, *found = results[-1].objects
    assert (union.object_id, union.instance_id, union.part_of) == ("reds", goal.instance_id, "")
    assert np.array_equal(union.mask, truths(TWO_REDS, 9)[0] | truths(TWO_REDS, 9)[1])
    assert [(each.object_id, each.part_of, each.state) for each in found] == [
        ("reds.1", "reds", TRACKING),
        ("reds.2", "reds", TRACKING),
    ]
    for each, truth in zip(found, truths(TWO_REDS, 9), strict=True):
        assert np.array_equal(each.mask, truth)
        assert each.score > 0.8
    assert len({each.instance_id for each in results[-1].objects}) == 3
    assert [(known.object_id, known.state) for known in session.known_objects()[goal.goal_id]] == [
        ("reds", TRACKING),
        ("reds.1", TRACKING),
        ("reds.2", TRACKING),
    ]


def test_in_the_mask_image_instances_win_over_their_union() -> None:
    session = session_of()
    goal = session.set_goal("red", max_instances=2)
    video = Video([red_square(1, 1, 4), red_square(6, 11), Square(RED, lambda t: (11, 3), 2)])
    result = run(session, video, range(12))[-1]
    ids = instance_map(result.objects, 32, 32)
    found = [each.instance_id for each in result.objects if each.part_of]
    assert len(found) == 2
    assert [set(ids[truth].tolist()) for truth in truths(video, 11)] == [{found[0]}, {found[1]}, {goal.instance_id}]


def test_masks_have_the_cameras_size() -> None:
    video = Video(TWO_REDS.squares, scale=(2, 3))
    session = session_of()
    session.set_goal("red", max_instances=4)
    found = parts(run(session, video, range(8))[-1])
    for each, truth in zip(found.values(), truths(video, 7), strict=True):
        expected = np.kron(truth, np.ones((2, 3), bool))
        assert (each.mask & expected).sum() > 0.9 * (each.mask | expected).sum()


@pytest.mark.parametrize("is_split", [True, False])
def test_what_comes_later_joins_a_goal_in_the_plural_and_takes_no_single_object(is_split: bool) -> None:
    video = Video([red_square(3, 2, 2), red_square(8, 8, 6, hidden=range(30))])
    session = session_of(period_s=0.3, retry_s=0.3, overrule_answers=3)
    session.set_goal("red", object_id="reds", max_instances=4 if is_split else 1)
    union, *_ = run(session, video, range(90))[-1].objects
    first, second = truths(video, 89)
    assert np.array_equal(union.mask, first | second if is_split else first)
    assert union.message == "" or not is_split


@pytest.mark.parametrize(
    ("sentence", "split_plurals", "asked", "is_split"),
    [
        ("the red squares", True, 0, True),
        ("the red square", True, 0, False),
        ("the red squares", False, 0, False),
        ("the red squares", True, 1, False),
        ("the red square", False, 2, True),
    ],
)
def test_who_splits_a_goal(sentence: str, split_plurals: bool, asked: int, is_split: bool) -> None:
    config = small_config(max_objects=5, instance_steps=4)
    config = dataclasses.replace(config, goal=dataclasses.replace(config.goal, split_plurals=split_plurals))
    session = Session(config, LocalStages(), InstantClient())
    goal = session.set_goal(sentence, max_instances=asked)
    assert (goal.max_instances > 1) == is_split
    assert len(run(session, TWO_REDS, range(10))[-1].objects) == (3 if is_split else 1)


@pytest.mark.parametrize("asked", [-1, 255])
def test_a_number_of_instances_that_cannot_be_is_refused(asked: int) -> None:
    with pytest.raises(BadGoal, match=f"max_instances must be 0 to 254, got {asked}"):
        session_of().set_goal("red", max_instances=asked)


def test_one_that_hides_and_comes_back_keeps_its_ids_while_the_reasoner_answers_again_and_again() -> None:
    video = Video([red_square(3, 2), red_square(9, 11, hidden=range(20, 60))])
    session = session_of(period_s=0.5)
    session.set_goal("red", object_id="reds", max_instances=4)
    results = run(session, video, range(90))
    ids = {name: each.instance_id for name, each in parts(results[10]).items()}
    assert set(ids) == {"reds.1", "reds.2"}
    for t, result in enumerate(results[10:], 10):
        assert {name: each.instance_id for name, each in parts(result).items()} == ids
        is_hidden = 22 <= t < 60
        assert parts(result)["reds.2"].state is (LOST if is_hidden else TRACKING), t
        assert np.array_equal(parts(result)["reds.2"].mask, video.truth(t, 1))
        assert np.array_equal(parts(result)["reds.1"].mask, video.truth(t, 0))
    assert "comes back" in parts(results[40])["reds.2"].message


def test_two_of_one_colour_that_touch_stay_two() -> None:
    comes = Square(RED, lambda t: place(t, (6, 1), (6, 4), 12, 24) if t < 40 else place(t, (6, 4), (6, 1), 40, 52), 3)
    video = Video([comes, red_square(6, 7)])  # side by side from frame 24 to 40
    session = session_of(period_s=0.5)
    session.set_goal("red", max_instances=4)
    results = run(session, video, range(70))
    before = by_place(results[10], truths(video, 10))
    assert all(before)
    for t, result in enumerate(results[10:], 10):
        assert set(parts(result)) == set(before)
        assert by_place(result, truths(video, t)) == before, t


def test_one_that_passes_behind_its_twin_comes_out_with_one_of_the_two_ids_and_none_is_made() -> None:
    """Which of two equals is which cannot be seen; that there are two can."""
    video = Video([Square(RED, lambda t: place(t, (6, 1), (6, 12), 10, 40), 3), red_square(6, 6)])
    session = session_of(period_s=0.5)
    session.set_goal("red", max_instances=4)
    results = run(session, video, range(80))
    before = set(by_place(results[8], truths(video, 8)))
    assert len(before) == 2
    assert all(set(parts(result)) <= before for result in results)
    assert set(by_place(results[-1], truths(video, 79))) == before


def test_clearing_a_goal_clears_its_instances_and_leaves_other_goals_as_they_are() -> None:
    video = Video([*TWO_REDS.squares, Square(BLUE, lambda t: (12, 1 + t % 8), 2)])
    alone, session = session_of(), session_of()
    for each in (alone, session):
        blue = each.set_goal("blue")
    reds = session.set_goal("red", max_instances=4)
    expected = run(alone, video, range(20))
    for t, result in enumerate(run(session, video, range(10))):
        assert np.array_equal(result.objects[0].mask, expected[t].objects[0].mask)
    assert len(session.known_objects()[reds.goal_id]) == 3
    session.clear_goal(reds.goal_id)
    assert list(session.known_objects()) == [blue.goal_id]
    for t, result in enumerate(run(session, video, range(10, 20)), 10):
        (found,) = result.objects
        assert np.array_equal(found.mask, expected[t].objects[0].mask)
        assert found.score == pytest.approx(expected[t].objects[0].score)
    for number in range(4):
        session.set_goal("red", object_id=f"another {number}")


def test_one_that_the_user_removes_does_not_come_back_and_the_others_stay() -> None:
    session = session_of()
    goal = session.set_goal("red", object_id="reds", max_instances=4)
    run(session, TWO_REDS, range(10))
    session.remove_object("reds.1")
    assert [known.object_id for known in session.known_objects()[goal.goal_id]] == ["reds", "reds.2"]
    for result in run(session, TWO_REDS, range(10, 60)):
        assert list(parts(result)) == ["reds.2"]
        assert set(instance_map(result.objects, 32, 32)[truths(TWO_REDS, 10)[0]].tolist()) == {goal.instance_id}
    for unknown in ("reds.1", "reds.7"):
        with pytest.raises(UnknownGoal, match="there is no object"):
            session.remove_object(unknown)
    session.remove_object("reds")
    assert session.goals() == ()
    assert run(session, TWO_REDS, [60])[0].objects == ()


def test_without_free_objects_the_union_says_so_and_new_goals_are_told_why() -> None:
    session = session_of(max_objects=2)
    session.set_goal("red", max_instances=4)
    result = run(session, TWO_REDS, range(20))[-1]
    assert len(parts(result)) == 1
    assert "raise tracking.max_objects" in result.objects[0].message
    assert result.objects[0].state is TRACKING
    with pytest.raises(BadGoal, match="all 2 objects are in use, 1 of them by instances of goals that are split"):
        session.set_goal("blue")
    session.clear_goal(session.goals()[0].goal_id)
    session.set_goal("blue")


def test_removed_ones_keep_their_places_and_the_refusal_says_what_frees_one() -> None:
    session = session_of(max_objects=3)
    goal = session.set_goal("red", object_id="reds", max_instances=4)
    run(session, TWO_REDS, range(10))
    session.remove_object("reds.1")
    run(session, TWO_REDS, range(10, 12))
    with pytest.raises(
        BadGoal, match=r"2 of them by instances .*\(removed ones count until their goal ends\)"
    ) as refused:
        session.set_goal("blue")
    assert "remove an instance" not in str(refused.value)
    session.clear_goal(goal.goal_id)
    session.set_goal("blue")


def test_one_that_was_removed_and_lost_for_long_makes_no_room_and_is_no_new_one_when_it_comes_back() -> None:
    hides = red_square(9, 11, hidden=range(12, 60))
    video = Video([red_square(3, 2), hides, red_square(12, 1, hidden=[*range(30), *range(58, 999)])])
    session = session_of(max_objects=3, period_s=0.5)
    session.set_goal("red", object_id="reds", max_instances=4)
    found = by_place(run(session, video, range(10))[-1], truths(video, 9)[:2])
    assert found == ["reds.1", "reds.2"]
    session.remove_object("reds.2")
    for result in run(session, video, range(10, 120)):
        assert set(parts(result)) == {"reds.1"}


def test_an_instance_keeps_its_memory_when_it_begins_while_another_goal_is_cleared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = session_of(max_objects=3)
    session.set_goal("red", object_id="reds", max_instances=4)
    session.set_goal("blue")
    victim = session.set_goal("blue")
    begin, cleared = InstanceTracks._begin, []

    def clear_and_begin(self: InstanceTracks, masks: Sequence[np.ndarray], *args: int) -> None:
        if masks and not cleared:
            cleared.append(session.clear_goal(victim.goal_id))
        begin(self, masks, *args)

    monkeypatch.setattr(InstanceTracks, "_begin", clear_and_begin)
    results = run(session, TWO_REDS, range(40))
    assert cleared
    assert [set(parts(result)) for result in results[-20:]] == [{"reds.1"}] * 20
    for result in results:
        for each in parts(result).values():
            assert each.state is TRACKING


def test_no_instance_loses_its_id_while_other_threads_set_and_clear_other_goals() -> None:
    """There are so few slots that instances begin in those that were left a moment ago."""
    session = session_of(max_objects=4, instance_steps=2)
    is_done, failures = threading.Event(), list[Exception]()

    def set_and_clear(number: int) -> None:
        draw = np.random.default_rng(number)
        try:
            while not is_done.wait(draw.uniform(0, 0.003)):
                with contextlib.suppress(BadGoal):  # all slots are in use
                    goal_id = session.set_goal("blue").goal_id
                    is_done.wait(draw.uniform(0, 0.01))
                    session.clear_goal(goal_id)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=set_and_clear, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    begun = 0
    try:
        for turn in range(20):
            goal = session.set_goal("red", object_id="reds", max_instances=2, goal_id=f"turn {turn}")
            seen: dict[str, int] = {}
            for result in run(session, TWO_REDS, range(turn * 12, turn * 12 + 12)):
                found = parts(result)
                assert {each.state for each in found.values()} <= {TRACKING}
                assert seen.items() <= {name: each.instance_id for name, each in found.items()}.items()
                seen = {name: each.instance_id for name, each in found.items()}
            begun += len(seen)
            session.clear_goal(goal.goal_id)
    finally:
        is_done.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert begun > 10


def test_one_that_was_lost_for_long_makes_room_for_a_new_one() -> None:
    video = Video([red_square(3, 2), red_square(9, 11, hidden=range(12, 999)), red_square(12, 1, hidden=range(50))])
    session = session_of(max_objects=3, period_s=0.5)
    session.set_goal("red", object_id="reds", max_instances=4)
    results = run(session, video, range(80))
    assert set(parts(results[45])) == {"reds.1", "reds.2"}
    assert set(parts(results[-1])) == {"reds.1", "reds.3"}
    assert np.array_equal(parts(results[-1])["reds.3"].mask, video.truth(79, 2))


def test_another_prompt_shows_an_instance_once_more() -> None:
    session = session_of()
    goal = session.set_goal("red", object_id="reds", max_instances=4)
    result = run(session, TWO_REDS, range(10))[-1]
    second = parts(result)["reds.2"]
    assert second.prompt_age_s == pytest.approx(0.6)
    assert session.prompt_object("reds.2", MaskPrompt(second.mask)) == goal
    result = run(session, TWO_REDS, [10])[0]
    assert parts(result)["reds.2"].prompt_age_s == pytest.approx(0.1)
    assert np.array_equal(parts(result)["reds.2"].mask, second.mask)
    middle = np.argwhere(truths(TWO_REDS, 9)[1]).mean(axis=0)[::-1]
    session.prompt_object("reds.2", ClickPrompt(middle[None]), stamp_ns=TWO_REDS.frame(9).stamp_ns)
    for result in run(session, TWO_REDS, range(11, 20)):  # of an older frame: replayed
        assert by_place(result, truths(TWO_REDS, 9)) == ["reds.1", "reds.2"]
    with pytest.raises(UnknownGoal, match=r"'reds\.3'"):
        session.prompt_object("reds.3", MaskPrompt(second.mask))


def test_results_know_their_sentence_when_the_goal_is_cleared_during_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of()
    goal = session.set_goal("red", object_id="reds", max_instances=4)
    run(session, TWO_REDS, range(10))
    watch = InstanceTracks.watch

    def clear_and_watch(self: InstanceTracks, *args: Sighting | int | None) -> None:
        session.clear_goal(goal.goal_id)
        watch(self, *args)

    monkeypatch.setattr(InstanceTracks, "watch", clear_and_watch)
    result = run(session, TWO_REDS, [10])[0]
    assert session.goals() == ()
    assert [(each.object_id, each.sentence) for each in result.objects] == [
        ("reds", "red"),
        ("reds.1", "red"),
        ("reds.2", "red"),
    ]
    assert run(session, TWO_REDS, [11])[0].objects == ()


def test_when_the_sentence_turns_out_to_mean_another_thing_the_instances_of_the_old_meaning_go() -> None:
    video = Video([*TWO_REDS.squares, Square(BLUE, lambda t: (12, 2), 2), Square(BLUE, lambda t: (2, 11), 2)])
    meant = iter([RED])
    client = DelayedClient(FakeReasoner(lambda request: next(meant, BLUE)), delay_steps=2)
    session = session_of(client, period_s=0.8, retry_s=0.8, overrule_answers=1)
    session.set_goal("it", object_id="its", max_instances=3)
    seen = []
    for t in range(60):
        client.tick()
        seen.append(set(parts(session.step(video.frame(t)))))
    assert {"its.1", "its.2"} in seen
    assert seen[-1] == {"its.3", "its.4"}
    assert [len(names) for names, _ in itertools.groupby(seen)] == [0, 2, 0, 2]


def test_a_reset_forgets_instances_and_finds_them_anew_under_other_ids() -> None:
    session = session_of()
    session.set_goal("red", object_id="reds", max_instances=4)
    before = run(session, TWO_REDS, range(10))[-1]
    session.reset()
    results = run(session, TWO_REDS, range(10, 20))
    assert len(results[0].objects) == 1
    assert set(parts(results[-1])) == {"reds.3", "reds.4"}
    ids = {each.instance_id for each in (*before.objects, *results[-1].objects)}
    assert len(ids) == 5
    back = session.step(TWO_REDS.frame(3))  # the clock goes back
    assert len(back.objects) == 1


def test_each_camera_finds_instances_of_its_own_in_slots_of_its_own() -> None:
    videos = {"left": TWO_REDS, "right": Video([red_square(2, 2), red_square(2, 11), red_square(11, 6)])}
    clients = {camera: InstantClient() for camera in videos}
    session = Session(small_config(max_objects=4, instance_steps=4), LocalStages(), clients)
    goal = session.set_goal("red", object_id="reds", max_instances=4)
    for t in range(12):
        frames = {camera: video.frame(t) for camera, video in videos.items()}
        results = session.step_together(
            [Frame(frame.image_rgb_u8, frame.stamp_ns, camera) for camera, frame in frames.items()]
        )
    left, right = (parts(result) for result in results)
    assert (len(left), len(right)) == (2, 3)
    assert not left.keys() & right.keys()
    values = [each.instance_id for result in results for each in result.objects]
    assert len(set(values)) == len(values) - 1  # the union has one for both
    assert {known.object_id for known in session.known_objects()[goal.goal_id]} == {"reds", *left, *right}
    name, found = next(iter(right.items()))
    with pytest.raises(UnknownGoal):
        session.prompt_object(name, MaskPrompt(found.mask), camera="left")
    session.prompt_object(name, MaskPrompt(found.mask), camera="right")


def test_a_name_of_an_instance_that_a_user_has_taken_is_left_out() -> None:
    session = session_of()
    session.set_goal("blue", object_id="reds.1")
    session.set_goal("red", object_id="reds", max_instances=4)
    assert set(parts(run(session, TWO_REDS, range(10))[-1])) == {"reds.2", "reds.3"}
    with pytest.raises(BadGoal, match=r"'reds\.2' is in use"):
        session.set_goal("green", object_id="reds.2")


def test_nothing_is_split_before_the_union_is_sure() -> None:
    def meaning(request: ReasonerRequest) -> tuple[float, float, float]:
        return RED

    stages = LocalStages()
    stages.iou = 0.3  # below memory.min_write_iou
    session = Session(small_config(max_objects=5, instance_steps=2), stages, InstantClient(FakeReasoner(meaning)))
    session.set_goal("red", max_instances=4)
    assert not any(parts(result) for result in run(session, TWO_REDS, range(10)))
    stages.iou = 0.9
    assert parts(run(session, TWO_REDS, range(10, 20))[-1])
