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
