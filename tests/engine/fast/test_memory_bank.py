# SPDX-License-Identifier: Apache-2.0
import torch

from tests.fakes import SIZES
from virst_engine.config import MemoryParameters
from virst_engine.fast.memory_bank import MemoryBank, Recall
from virst_engine.types import MemoryEntry, MemoryTensors


def entry(*values: float) -> MemoryEntry:
    """One row per value, filled with it."""
    spatial = torch.stack([torch.full((4, 4, 4), value) for value in values])
    return MemoryEntry(spatial, torch.stack([torch.full((8,), value) for value in values]))


def bank(rows: int = 2, **parameters: int) -> MemoryBank:
    return MemoryBank(SIZES, MemoryParameters(**parameters), rows)


def attended(memory: MemoryTensors, row: int = 0) -> list[tuple[float, int]]:
    """(value, temporal row) of the valid spatial memories."""
    return [
        (float(memory.spatial[row, s, 0, 0, 0]), int(memory.spatial_tpos[row, s]))
        for s in range(memory.spatial.shape[1])
        if memory.spatial_valid[row, s]
    ]


def told(memory: MemoryTensors, row: int = 0) -> list[tuple[float, float]]:
    """(value, distance) of the valid pointers."""
    return [
        (float(memory.pointers[row, r, 0]), float(memory.pointer_distance[row, r]))
        for r in range(memory.pointers.shape[1])
        if memory.pointer_valid[row, r]
    ]


def test_nothing_is_valid_in_an_empty_bank() -> None:
    memory = bank().read(5, [0])
    assert memory.spatial.shape == (1, 3 + 6, 4, 4, 4)
    assert memory.pointers.shape == (1, 3 + 15, 8)
    assert not memory.spatial_valid.any()
    assert not memory.pointer_valid.any()


def test_a_frame_attends_to_the_nearest_anchors_of_the_past_only() -> None:
    memories = bank(anchors_attended=3)
    for step in (2, 10, 20, 30, 41):
        memories.remember_anchor(0, step, entry(float(step)))
    # At step 25 the distances are 23, 15, 5; 30 and 41 are in the future.
    assert attended(memories.read(25, [0])) == [(20.0, 6), (10.0, 6), (2.0, 6)]
    assert attended(memories.read(31, [0])) == [(30.0, 6), (20.0, 6), (10.0, 6)]
    assert attended(memories.read(10, [0])) == [(10.0, 6), (2.0, 6)]
    assert told(memories.read(31, [0])) == [(30.0, 1.0), (20.0, 11.0), (10.0, 21.0)]


def test_recent_frames_are_encoded_by_how_many_writes_ago_they_were() -> None:
    memories = bank()
    for step in range(1, 9):  # two more than the ring holds
        memories.remember_recent(0, step, entry(float(step)))
    assert attended(memories.read(9, [0])) == [(8.0, 0), (7.0, 1), (6.0, 2), (5.0, 3), (4.0, 4), (3.0, 5)]
    # Five frames later without a write: the same views, the pointers know their age.
    assert attended(memories.read(14, [0])) == [(8.0, 0), (7.0, 1), (6.0, 2), (5.0, 3), (4.0, 4), (3.0, 5)]
    assert told(memories.read(14, [0]))[:2] == [(8.0, 6.0), (7.0, 7.0)]
    assert memories.recent_steps(0) == [3, 4, 5, 6, 7, 8]


def test_pointers_of_the_last_fifteen_writes_are_kept() -> None:
    memories = bank()
    for step in range(20):
        memories.remember_recent(0, step, entry(float(step)))
    assert told(memories.read(20, [0])) == [(float(step), float(20 - step)) for step in range(19, 4, -1)]


def test_one_pointer_means_those_of_the_anchors_only() -> None:
    memories = bank(pointers=1)
    memories.remember_anchor(0, 0, entry(7.0))
    memories.remember_recent(0, 1, entry(8.0))
    assert told(memories.read(2, [0])) == [(7.0, 2.0)]


def test_the_first_anchor_stays_and_the_oldest_other_makes_room() -> None:
    memories = bank(anchor_slots=3)
    for step in (5, 10, 15, 20):
        memories.remember_anchor(0, step, entry(float(step)))
    assert memories.anchor_steps(0) == [5, 15, 20]
    memories.remember_anchor(0, 12, entry(12.0))  # older than all that may go
    assert memories.anchor_steps(0) == [5, 15, 20]
    memories.remember_anchor(0, 5, entry(-5.0))  # the same frame again, even the first
    assert attended(memories.read(6, [0])) == [(-5.0, 6)]


def test_a_single_anchor_slot_holds_the_newest() -> None:
    memories = bank(anchor_slots=1, anchors_attended=1)
    memories.remember_anchor(0, 5, entry(5.0))
    memories.remember_anchor(0, 9, entry(9.0))
    assert memories.anchor_steps(0) == [9]


def test_objects_do_not_share_memory_and_are_read_in_the_order_asked() -> None:
    memories = bank(rows=3)
    memories.remember_anchor(0, 0, entry(1.0, 2.0), 1)
    memories.remember_anchor(2, 0, entry(3.0))
    memories.remember_recent(2, 1, entry(4.0))
    memory = memories.read(2, [2, 0])
    assert attended(memory, 0) == [(3.0, 6), (4.0, 0)]
    assert attended(memory, 1) == [(2.0, 6)]


def test_copy_slot_is_a_copy_and_clear_forgets() -> None:
    memories = bank()
    memories.remember_anchor(0, 0, entry(1.0))
    memories.remember_recent(0, 1, entry(2.0))
    memories.remember_anchor(1, 7, entry(9.0))
    memories.copy_slot(0, 1)
    memories.clear(0)
    memories.remember_anchor(0, 3, entry(5.0))
    assert attended(memories.read(8, [1])) == [(1.0, 6), (2.0, 0)]
    assert attended(memories.read(8, [0])) == [(5.0, 6)]
    assert memories.is_empty(0) is False
    memories.clear(0)
    assert memories.is_empty(0)


def test_what_was_read_does_not_change_with_later_writes() -> None:
    memories = bank()
    memories.remember_anchor(0, 0, entry(1.0))
    memory = memories.read(1, [0])
    memories.remember_anchor(0, 0, entry(2.0))
    assert attended(memory) == [(1.0, 6)]


class TestRulesOfSam2:
    """`memory.rules` "sam2": recent means frames ago, not writes ago; a frame is an anchor or a recent one."""

    def bank(self) -> MemoryBank:
        return MemoryBank(SIZES, MemoryParameters(rules="sam2", anchors_attended=2, anchor_slots=4), 1)

    @staticmethod
    def steps_read(bank: MemoryBank, step: int) -> tuple[list[int], list[int]]:
        """Steps of the memories and of the pointers that a frame attends to; each entry is filled with its step."""
        memory = bank.read(step, [0])
        spatial = memory.spatial[0, memory.spatial_valid[0]][:, 0, 0, 0].tolist()
        pointers = memory.pointers[0, memory.pointer_valid[0]][:, 0].tolist()
        assert memory.pointer_distance[0, memory.pointer_valid[0]].tolist() == [step - at for at in pointers]
        return [int(at) for at in spatial], [int(at) for at in pointers]

    @staticmethod
    def entry(step: int) -> MemoryEntry:
        grid, m, c = SIZES.grid, SIZES.memory_channels, SIZES.channels
        return MemoryEntry(torch.full((1, m, grid, grid), float(step)), torch.full((1, c), float(step)))

    def test_an_anchor_takes_the_place_of_what_was_tracked_in_its_frame(self) -> None:
        bank = self.bank()
        bank.remember_anchor(0, 0, self.entry(0))
        for step in range(1, 6):
            bank.remember_recent(0, step, self.entry(step))
        bank.remember_anchor(0, 4, self.entry(4))
        assert self.steps_read(bank, 6) == ([4, 0, 5, 3, 2, 1], [4, 0, 5, 3, 2, 1])

    def test_an_anchor_that_is_not_attended_as_one_counts_as_a_recent_frame(self) -> None:
        bank = self.bank()
        for step in (0, 2, 3):
            bank.remember_anchor(0, step, self.entry(step))
        bank.remember_recent(0, 1, self.entry(1))
        assert self.steps_read(bank, 4) == ([3, 2, 1, 0], [3, 2, 1, 0])

    def test_what_is_further_back_than_the_window_is_not_read(self) -> None:
        bank = self.bank()
        bank.remember_anchor(0, 0, self.entry(0))
        for step in range(1, 30):
            bank.remember_recent(0, step, self.entry(step))
        spatial, pointers = self.steps_read(bank, 30)
        assert spatial == [0, 29, 28, 27, 26, 25, 24]
        assert pointers == [0, *range(29, 14, -1)]

    def test_memories_are_rounded_to_bfloat16(self) -> None:
        bank, entry = self.bank(), self.entry(1)
        exact = MemoryEntry(entry.spatial + 2.0**-12, entry.pointer + 2.0**-12)
        bank.remember_anchor(0, 0, exact)
        memory = bank.read(1, [0])
        assert float(memory.spatial[0, 0, 0, 0, 0]) == 1.0
        assert float(memory.pointers[0, 0, 0]) == 1.0 + 2.0**-12


def full_bank() -> MemoryBank:
    """Anchors of steps 0, 1, 2 and 3, recent frames 4 to 11; each is filled with its step."""
    memory = bank()
    for step in range(4):
        memory.remember_anchor(0, step, entry(float(step)))
    for step in range(4, 12):
        memory.remember_recent(0, step, entry(float(step)))
    return memory


def test_less_is_recalled_when_asked_to_and_nothing_is_lost() -> None:
    memory = full_bank()
    before = memory.read(12, [0])
    memory.recall_at_most(Recall(anchors=1, recent=2, pointers=3))
    less = memory.read(12, [0])
    assert attended(less) == [(3.0, 6), (11.0, 0), (10.0, 1)]
    assert told(less) == [(3.0, 9.0), (11.0, 1.0), (10.0, 2.0), (9.0, 3.0)]
    assert less.spatial.shape[1] == 3
    memory.recall_at_most(Recall(anchors=100, recent=100, pointers=100))
    assert torch.equal(memory.read(12, [0]).spatial, before.spatial)
    memory.recall_at_most(None)
    after = memory.read(12, [0])
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in vars(before))


def test_no_pointers_but_the_anchors_may_be_recalled() -> None:
    memory = full_bank()
    memory.recall_at_most(Recall(anchors=2, recent=1, pointers=0))
    assert told(memory.read(12, [0])) == [(3.0, 9.0), (2.0, 10.0)]


def noise(seed: int, side: int = 4) -> MemoryEntry:
    generator = torch.Generator().manual_seed(seed)
    return MemoryEntry(torch.randn(1, 4, side, side, generator=generator), torch.randn(1, 8, generator=generator))


def test_memories_follow_the_grid_and_old_ones_come_back_unharmed() -> None:
    memory = bank()
    for step in range(2):
        memory.remember_anchor(0, step, noise(step))
    memory.remember_recent(0, 2, noise(2))
    before = memory.read(3, [0])

    memory.resize(2)
    small = memory.read(3, [0])
    assert small.spatial.shape[-2:] == (2, 2)
    # Half the side: each cell is the mean of four.
    assert torch.allclose(small.spatial, torch.nn.functional.avg_pool2d(before.spatial[0], 2)[None], atol=1e-6)
    assert torch.equal(small.pointers, before.pointers)
    memory.remember_anchor(0, 1, noise(7, 2))
    memory.remember_recent(0, 3, noise(8, 2))
    memory.copy_slot(0, 1)

    memory.resize(4)
    for row in (0, 1):
        after = memory.read(4, [row])
        # Columns: anchors 1 and 0, newest first; then the recent ones, 3 and 2.
        assert torch.equal(after.spatial[0, 1], noise(0).spatial[0])
        assert torch.equal(after.spatial[0, 4], noise(2).spatial[0])
        for column, seed in ((0, 7), (3, 8)):
            enlarged = torch.nn.functional.interpolate(noise(seed, 2).spatial, size=(4, 4), mode="bilinear")[0]
            assert torch.allclose(after.spatial[0, column], enlarged, atol=1e-6)


def test_a_slot_that_was_emptied_meanwhile_gets_nothing_back() -> None:
    memory = bank()
    memory.remember_anchor(0, 0, noise(0))
    memory.resize(2)
    memory.clear(0)
    memory.remember_anchor(0, 0, noise(5, 2))
    memory.resize(4)
    enlarged = torch.nn.functional.interpolate(noise(5, 2).spatial, size=(4, 4), mode="bilinear")[0]
    assert torch.allclose(memory.read(1, [0]).spatial[0, 0], enlarged, atol=1e-6)
