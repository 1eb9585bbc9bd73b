# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virst_engine.errors import BadGoal
from virst_engine.fast.object_registry import ObjectRegistry


def test_slots_are_reused_and_instance_ids_are_not_reused_at_once() -> None:
    registry = ObjectRegistry(2)
    assert (registry.assign("a").slot, registry.assign("b").slot) == (0, 1)
    registry.release("a")
    again = registry.assign("c")
    assert (again.slot, again.instance_id) == (0, 3)


def test_254_objects_fit_and_the_next_is_refused() -> None:
    registry = ObjectRegistry(254)
    assert [registry.assign(str(i)).instance_id for i in range(254)] == list(range(1, 255))
    with pytest.raises(BadGoal, match="all 254 objects"):
        registry.assign("one more")
    registry.release("99")
    assert registry.assign("again").instance_id == 100  # the only one that is free


def test_an_id_in_use_is_refused() -> None:
    registry = ObjectRegistry(2)
    registry.assign("a")
    with pytest.raises(BadGoal, match="'a' is in use"):
        registry.assign("a")


def test_instances_get_the_highest_free_slots_of_the_camera_that_found_them() -> None:
    registry = ObjectRegistry(3, ("left", "right"))
    union = registry.assign("balls")
    found = [registry.assign_instance("balls", camera) for camera in ("left", "right", "left", "left", "right")]
    assert union.slots == {"left": 0, "right": 0}
    assert [each and (each.object_id, each.slots) for each in found] == [
        ("balls.1", {"left": 2}),
        ("balls.2", {"right": 2}),
        ("balls.3", {"left": 1}),
        None,
        ("balls.4", {"right": 1}),
    ]
    assert len({each.instance_id for each in (union, *found) if each is not None}) == 5
    with pytest.raises(BadGoal, match="all 3 objects are in use, 2 of them by instances"):
        registry.assign("can")
    registry.release("balls.1")
    assert registry.assign("can", ["left"]).slots == {"left": 2}
    assert [each.object_id for each in registry.instances("balls")] == ["balls.2", "balls.3", "balls.4"]


def test_a_number_of_an_instance_never_comes_again_while_its_union_lives() -> None:
    registry = ObjectRegistry(3)
    registry.assign("balls")
    for number in range(1, 5):
        found = registry.assign_instance("balls", "")
        assert found is not None
        assert found.object_id == f"balls.{number}"
        registry.release(found.object_id)


def test_a_slot_whose_object_is_not_forgotten_yet_goes_to_no_instance_but_to_an_object_that_is_asked_for() -> None:
    registry = ObjectRegistry(2, ("left", "right"))
    registry.assign("balls")
    for _ in range(2):  # and it has gone again before the first one is forgotten
        assert registry.assign("can").slots == {"left": 1, "right": 1}
        registry.leave("left", [registry.release("can").slots["left"]])
    registry.has_left("left", [1])
    assert registry.assign_instance("balls", "left") is None
    found = registry.assign_instance("balls", "right")
    assert found is not None
    assert found.slots == {"right": 1}
    registry.has_left("left", [1])
    found = registry.assign_instance("balls", "left")
    assert found is not None
    assert found.slots == {"left": 1}


def test_a_hidden_instance_keeps_what_it_has_and_is_not_told_of() -> None:
    registry = ObjectRegistry(2)
    registry.assign("balls")
    found = registry.assign_instance("balls", "")
    assert found is not None
    registry.hide(found.object_id)
    assert registry.find(found.object_id) is None
    assert registry.instances("balls") == []
    assert registry.instances("balls", hidden=True) == [found]
    assert registry.assign_instance("balls", "") is None
    assert registry.release(found.object_id) == found


def test_when_all_values_of_the_mask_are_in_use_there_is_no_instance_and_no_goal() -> None:
    cameras = [str(i) for i in range(3)]
    registry = ObjectRegistry(100, cameras)
    registry.assign("balls")
    found = [registry.assign_instance("balls", camera) for camera in cameras for _ in range(99)]
    assert len([each for each in found if each is not None]) == 253
    registry = ObjectRegistry(254, cameras)
    for i in range(254):
        registry.assign(str(i), [cameras[i % 3]])
    with pytest.raises(BadGoal, match="all 254 values of the mask image"):
        registry.assign("one more")


def test_more_slots_than_instance_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="254"):
        ObjectRegistry(255)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=600))
def test_the_living_never_share_a_slot_or_an_instance_id(moves: list[tuple[bool, int]]) -> None:
    registry, alive = ObjectRegistry(6), {}
    for is_new, number in moves:
        name = str(number)
        if is_new and name not in alive and len(alive) < 6:
            alive[name] = registry.assign(name)
        elif not is_new and name in alive:
            assert registry.release(name) == alive.pop(name)
    assert len(registry) == len(alive)
    assert len({a.slot for a in alive.values()}) == len(alive)
    assert len({a.instance_id for a in alive.values()}) == len(alive)
    assert all(1 <= a.instance_id <= 254 for a in alive.values())
