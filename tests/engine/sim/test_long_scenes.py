# SPDX-License-Identifier: Apache-2.0
"""Long scenes: what is said to happen happens in the trajectory and in the pictures, to the end."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from virst_engine.errors import SceneError
from virst_engine.sim import geometry
from virst_engine.sim.expressions import find_meaning
from virst_engine.sim.long_scenes import generate_long_scene
from virst_engine.sim.mujoco_world import record, simulate
from virst_engine.sim.queries import TEMPORAL_KINDS, ask, ask_all_along
from virst_engine.sim.recording import stretches
from virst_engine.sim.scenes import generate_scene_and_motion, is_long
from virst_engine.sim.spec import SceneSpec

SECONDS, HZ = 40.0, 10.0
SEED = 5


@pytest.fixture(scope="module")
def scene():
    return generate_long_scene(SEED, duration_s=SECONDS)


@pytest.fixture(scope="module")
def motion(scene):
    return simulate(scene.spec, fps=HZ, duration_s=SECONDS)


@pytest.fixture(scope="module")
def recording(rendered, scene, motion):
    return record(scene.spec, fps=HZ, duration_s=SECONDS, width=64, height=48, trajectory=motion)


def places(scene, motion):
    """Where objects are in the image, in image widths; (t, n, 2)."""
    view = geometry.ViewGeometry(scene.spec.camera)
    return view.project(motion.position_m) * (1.0, 0.75)


def test_a_seed_gives_the_same_scene_and_another_one_another(scene):
    again = generate_long_scene(SEED, duration_s=SECONDS)
    assert again == scene
    assert generate_long_scene(SEED + 1, duration_s=SECONDS).spec != scene.spec


def test_the_specification_alone_gives_the_scene_again(scene, motion):
    """The play chose each push by where things were; the script made of them takes things to the same places."""
    spec = SceneSpec.from_json(scene.spec.to_json())
    assert spec == scene.spec
    np.testing.assert_array_equal(simulate(spec, fps=HZ, duration_s=SECONDS).position_m, motion.position_m)
    assert len(motion.time_s) == 400
    for happening in scene.happenings:
        pushes = scene.spec.objects[happening.object_id].pushes
        assert any(push.start_s == happening.start_s and push.end_s == happening.end_s for push in pushes)


def test_what_is_pushed_moves_and_what_is_not_rests(scene, motion):
    at = places(scene, motion)
    frames = np.arange(len(at)) / HZ
    busy = np.zeros(at.shape[:2], bool)
    for happening in scene.happenings:
        busy[(frames >= happening.start_s - 0.05) & (frames <= happening.end_s + 1.5), happening.object_id] = True
    for happening in scene.happenings:
        if happening.kind != "move" or happening.end_s > SECONDS - 1.0:
            continue
        before, after = round(happening.start_s * HZ), round((happening.end_s + 0.35) * HZ)
        way = np.linalg.norm(at[after, happening.object_id] - at[before, happening.object_id])
        assert 0.04 < way < 0.4, happening
    steps = np.linalg.norm(np.diff(motion.position_m, axis=0), axis=2)
    resting = ~busy[1:] & ~busy[:-1]
    assert np.quantile(steps[resting], 0.99) < 0.002  # metres in a tenth of a second
    assert steps[~resting].mean() > 10 * steps[resting].mean()


def test_things_leave_the_view_and_come_back(scene, motion):
    at = places(scene, motion)[..., 0]
    left = [happening for happening in scene.happenings if happening.kind == "leave"]
    back = [happening for happening in scene.happenings if happening.kind == "return"]
    assert len(left) >= len(back) >= 1
    for out, home in zip(left, back, strict=False):
        assert out.object_id == home.object_id
        assert out.end_s < home.start_s
        away = at[round((out.end_s + 0.4) * HZ) : round(home.start_s * HZ), out.object_id]
        assert ((away < 0) | (away > 1)).all()
        if home.end_s < SECONDS - 1.0:
            assert 0 < at[round((home.end_s + 0.4) * HZ), home.object_id] < 1


def test_things_go_on_happening_to_the_end(scene):
    ends = np.array([0.0, *(happening.end_s for happening in scene.happenings), SECONDS])
    assert np.diff(np.sort(ends)).max() <= 6.0
    assert {happening.kind for happening in scene.happenings if happening.start_s > 0.5 * SECONDS} >= {"move", "leave"}


def test_presence_is_where_the_pixels_are(scene, recording):
    for k in range(len(scene.spec.objects)):
        expected = [bool((mask == k + 1).any()) for mask in recording.instance_mask]
        assert recording.presence((k,)).tolist() == expected
    out = next(happening for happening in scene.happenings if happening.kind == "leave")
    home = next(happening for happening in scene.happenings if happening.kind == "return")
    gone = slice(round((out.end_s + 0.4) * HZ), round(home.start_s * HZ))
    assert not recording.presence((out.object_id,))[gone].any()
    assert recording.presence((out.object_id,)).any()
    assert not recording.presence(()).any()
    both = recording.presence((0, 1))
    assert (both == (recording.presence((0,)) | recording.presence((1,)))).all()
    with pytest.raises(SceneError, match="no images"):
        recording.without_images().presence((0,))


@pytest.mark.parametrize(
    ("present", "expected"),
    [([], []), ([0, 0], []), ([1, 1, 0, 1], [(0, 1), (3, 3)]), ([0, 1, 1], [(1, 2)])],
)
def test_stretches_of_presence(present, expected):
    assert stretches(np.array(present, bool)) == expected


def test_queries_of_all_three_families_have_clear_answers_all_along(recording):
    rng = np.random.default_rng(0)
    of_kind = {kind: [] for kind in TEMPORAL_KINDS}
    for frame in range(21, len(recording), 6):
        for query in ask(recording, frame, rng=rng):
            of_kind[query.expression.kind].append(query)
    for kind, queries in of_kind.items():
        frames = [query.query_frame for query in queries]
        assert len(queries) >= 6, kind
        assert {frame * 2 // len(recording) for frame in frames} == {0, 1}, kind
    for query in of_kind["order"][:3] + of_kind["count"][:3] + of_kind["event"][:3]:
        meaning = find_meaning(recording, query.expression.text, query_frame=query.query_frame)
        assert meaning is not None
        assert meaning.target_ids == query.expression.target_ids
        shows = np.zeros(len(recording), bool)
        for first, last in query.present:
            shows[first : last + 1] = True
        assert (shows == recording.presence(query.expression.target_ids)).all()
        assert shows[query.query_frame]


def test_what_moved_twice_has_moved_twice(scene, recording):
    """The truth of sentences against the pushes that were made, which it is not computed from."""
    rng = np.random.default_rng(1)
    said = 0
    for one, two in itertools.pairwise(scene.happenings):
        is_twice = one.object_id == two.object_id and one.kind == two.kind == "move" and two.start_s - one.end_s < 0.6
        if not is_twice or two.end_s > SECONDS - 0.5:
            continue
        for frame in range(round(two.start_s * HZ) + 2, round(two.end_s * HZ) + 2):
            for query in ask(recording, frame, ("count",), rng=rng):
                if query.expression.template_id.startswith("moved_twice"):
                    assert query.expression.target_ids == (two.object_id,)
                    said += 1
    assert said > 0


def test_queries_along_a_recording_take_turns(recording):
    queries = ask_all_along(recording, 9, TEMPORAL_KINDS, rng=np.random.default_rng(2), first_frame=21)
    frames = [query.query_frame for query in queries]
    assert len(queries) == 9
    assert frames == sorted(frames)
    assert {query.expression.kind for query in queries} == set(TEMPORAL_KINDS)


def test_a_frame_that_is_not_there_is_refused(recording):
    with pytest.raises(SceneError, match="query frame 400"):
        ask(recording, 400, rng=np.random.default_rng(0))


def test_long_scenes_are_those_of_the_family_full(scene):
    assert is_long("full", SECONDS)
    assert not is_long("full", 4.8)
    assert not is_long("plain", SECONDS)
    assert generate_scene_and_motion(SEED, "full", duration_s=SECONDS)[0] == scene.spec
    with pytest.raises(SceneError, match="seeds are >= 0"):
        generate_long_scene(-1, duration_s=SECONDS)


def test_without_its_pushes_the_table_is_at_rest(scene):
    assert all(thing.drop_at_s is None for thing in scene.spec.objects)
    assert scene.spec.arm is None
    still = tuple(replace(thing, pushes=()) for thing in scene.spec.objects)
    at_rest = simulate(replace(scene.spec, objects=still), duration_s=5)
    assert np.abs(at_rest.position_m - at_rest.position_m[0]).max() < 0.01


@pytest.mark.slow
def test_a_thousand_frames(rendered):
    """As `virst scenes write --seconds 100` records them."""
    made = generate_long_scene(0, duration_s=100.0)
    recording = record(made.spec, duration_s=100.0, width=64, height=48)
    assert len(recording) == 1000
    returned = {happening.object_id for happening in made.happenings if happening.kind == "return"}
    assert returned
    for k in returned:
        shown = stretches(recording.presence((k,)))
        assert len(shown) > 1
        assert shown[0][0] == 0
