"""SlotPool: its state machine, its views, its table; what a capacity may look like."""

import mmap
import random
import re

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefetch.errors import CapacityError
from prefetch.geometry import ExpertGeometry, ExpertKey, MoEGeometry
from prefetch.slots import SlotPool, parse_bytes, parse_slots

N_LAYERS, N_EXPERTS, N_SLOTS = 3, 4, 5


def geometry(dtype: torch.dtype = torch.float32, n_layers: int = N_LAYERS) -> MoEGeometry:
    return MoEGeometry(n_layers, N_EXPERTS, 2, ExpertGeometry(hidden=48, intermediate=20, dtype=dtype))


class PoolMachine(RuleBasedStateMachine):
    """The pool against three plain sets: free, acquired, published."""

    def __init__(self):
        super().__init__()
        self.pool = SlotPool(geometry(), N_SLOTS)
        self.free = set(range(N_SLOTS))
        self.acquired: set[int] = set()
        self.published: dict[ExpertKey, int] = {}

    @rule()
    def acquire(self):
        slot = self.pool.acquire()
        assert slot == min(self.free, default=None)
        if slot is not None:
            self.free.remove(slot)
            self.acquired.add(slot)

    @rule(slot=st.integers(0, N_SLOTS - 1))
    def release(self, slot):
        if slot in self.acquired:
            self.pool.release(slot)
            self.acquired.remove(slot)
            self.free.add(slot)
        else:
            with pytest.raises(ValueError, match=f"slot {slot}"):
                self.pool.release(slot)

    @rule(layer=st.integers(0, N_LAYERS - 1), expert=st.integers(0, N_EXPERTS - 1), slot=st.integers(0, N_SLOTS - 1))
    def publish(self, layer, expert, slot):
        key = ExpertKey(layer, expert)
        if slot in self.acquired and key not in self.published:
            self.pool.publish(key, slot)
            self.acquired.remove(slot)
            self.published[key] = slot
        else:
            with pytest.raises(ValueError, match=f"slot {slot}"):
                self.pool.publish(key, slot)

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def unpublish(self, data):
        key = data.draw(st.sampled_from(sorted(self.published)))
        self.pool.unpublish(key)
        self.acquired.add(self.published.pop(key))

    @rule(layer=st.integers(0, N_LAYERS - 1), expert=st.integers(0, N_EXPERTS - 1))
    def unpublish_absent(self, layer, expert):
        if (layer, expert) not in self.published:
            self.pool.unpublish(ExpertKey(layer, expert))

    @invariant()
    def table_names_exactly_the_published(self):
        expected = torch.full((N_LAYERS, N_EXPERTS), -1, dtype=torch.int32)
        for key, slot in self.published.items():
            expected[key.layer, key.expert] = slot
        assert torch.equal(self.pool.slot_of, expected)
        assert self.pool.n_free == len(self.free)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_show_the_bytes_of_their_slot_only(dtype):
    shape = geometry(dtype)
    expert = shape.expert
    pool = SlotPool(shape, N_SLOTS)
    for slot in random.Random(0).sample(range(N_SLOTS), N_SLOTS):
        generator = torch.Generator().manual_seed(slot)
        gate_up = torch.randn(2 * expert.intermediate, expert.hidden, generator=generator).to(dtype)
        down = torch.randn(expert.hidden, expert.intermediate, generator=generator).to(dtype)
        row = torch.zeros(expert.row_bytes, dtype=torch.uint8)
        row[: expert.gate_up_bytes] = gate_up.flatten().view(torch.uint8)
        row[expert.down_offset :][: expert.down_bytes] = down.flatten().view(torch.uint8)
        pool.buffer(slot)[:] = row.numpy().tobytes()
        assert torch.equal(pool.operands(slot)[0], gate_up.t())
        assert torch.equal(pool.operands(slot)[1], down.t())
    for slot in range(N_SLOTS):  # no later slot has touched an earlier one
        generator = torch.Generator().manual_seed(slot)
        gate_up = torch.randn(2 * expert.intermediate, expert.hidden, generator=generator).to(dtype)
        assert torch.equal(pool.operands(slot)[0], gate_up.t())


def test_slots_are_page_aligned_rows_of_one_allocation():
    pool = SlotPool(geometry(), N_SLOTS)
    starts = [pool.operands(slot)[0].data_ptr() for slot in range(N_SLOTS)]
    assert starts[0] % mmap.PAGESIZE == 0
    row_bytes = geometry().expert.row_bytes
    assert starts == [starts[0] + slot * row_bytes for slot in range(N_SLOTS)]
    assert all(len(pool.buffer(slot)) == row_bytes for slot in range(N_SLOTS))


def test_views_outlive_the_pool():
    view = SlotPool(geometry(), 1).operands(0)[0]
    assert torch.count_nonzero(view) == 0
    view.fill_(1)
    assert view.sum() == view.numel()


def test_unusable_pools_are_refused():
    with pytest.raises(CapacityError, match="at least 1"):
        SlotPool(geometry(), 0)
    with pytest.raises(CapacityError, match=r"cache\.slots"):
        SlotPool(geometry(), 1 << 50)


ROW = geometry().expert.row_bytes
ALL = 25 * N_EXPERTS


@pytest.mark.parametrize(
    ("spec", "n_slots"),
    [
        (1, 1),
        (64, 64),
        ("64", 64),
        (ALL, ALL),
        (1.0, ALL),
        ("1.0", ALL),
        (0.25, 25),
        ("0.25", 25),
        (0.29, 29),
        (0.019, 1),
        ("1e-2", 1),
        (f"{ROW}B", 1),
        (f"{2 * ROW - 1} b", 1),
        ("1MB", 10**6 // ROW),
        ("0.5MiB", 2**19 // ROW),
        ("12GB", ALL),
        (" 512 KiB ", 2**19 // ROW),
    ],
)
def test_capacity_forms(spec, n_slots):
    assert parse_slots(spec, geometry(n_layers=25), "cache.slots") == n_slots


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (0, "between 1 slot and all 100 experts"),
        (-3, "between 1 slot"),
        (ALL + 1, "all 100 experts"),
        ("101", "all 100 experts"),
        (0.0, "fraction"),
        (-0.5, "fraction"),
        (1.5, "at most 1.0"),
        ("1.5", "at most 1.0"),
        (0.005, "less than one slot"),
        (float("nan"), "fraction"),
        (float("inf"), "fraction"),
        ("nan", "a count"),
        ("1KB", "takes 12288 bytes"),
        ("-1GB", "less than one slot"),
        ("12 parsecs", "a count"),
        ("GB", "a count"),
        ("", "a count"),
        (True, "a count"),
        (None, "a count"),
        ([1], "a count"),
    ],
)
def test_bad_capacities_say_why(spec, reason):
    with pytest.raises(CapacityError, match=f"caches.mine: slots={re.escape(str(spec))}.*{reason}"):
        parse_slots(spec, geometry(n_layers=25), "caches.mine: slots")


@pytest.mark.parametrize(("text", "n_bytes"), [("12GB", 12 * 10**9), ("1.5 GiB", 3 * 2**29), ("4096b", 4096)])
def test_sizes_in_bytes(text, n_bytes):
    assert parse_bytes(text, "backend.memory") == n_bytes


@pytest.mark.parametrize("text", ["12", "0GB", "-1GB", "lots", "12 parsecs", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(CapacityError, match=r"backend\.memory=.*12GB"):
        parse_bytes(text, "backend.memory")
