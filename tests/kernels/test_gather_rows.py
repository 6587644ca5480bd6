"""Row copies by device-side lists, under Triton's interpreter: byte for byte, and not a byte elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cache_plan import cache_plan_reference
from kernels.device_cache import CachePlan, DeviceCache
from kernels.gather_rows import gather_launch, gather_rows, gather_rows_reference
from kernels.slot_table import addresses_of
from prefetch.errors import KernelInputError


def plan_for(keys: list[int], slots: list[int], n_demand: int) -> CachePlan:
    plan = CachePlan.empty(torch.zeros(1, len(keys) + 2), 0)
    plan.copy_keys[: len(keys)], plan.copy_slots[: len(slots)] = torch.tensor(keys), torch.tensor(slots)
    plan.copy_bounds.copy_(torch.tensor([0, n_demand, len(keys)]))
    return plan


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(
    row_words=st.integers(1, 300),
    n_copies=st.integers(1, 6),
    n_demand=st.integers(0, 6),
    part=st.sampled_from(["demand", "prefetch", "all"]),
    n_programs=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_any_plan(row_words: int, n_copies: int, n_demand: int, part: str, n_programs: int, seed: int) -> None:
    """Rows of 128 bytes to three blocks, slots 128 bytes further apart than that."""
    generator = torch.Generator().manual_seed(seed)
    host = random_bytes(12, 128 * row_words, seed=seed)
    pool = random_bytes(8, 128 * row_words + 128, seed=seed + 1)
    expected = pool.clone()
    keys = torch.randperm(12, generator=generator)[:n_copies].tolist()
    slots = torch.randperm(8, generator=generator)[:n_copies].tolist()
    plan = plan_for(keys, slots, min(n_demand, n_copies))
    gather_rows(pool[:, :-128], addresses_of(host).view(3, 4), plan, part, n_programs)
    gather_rows_reference(expected[:, :-128], dict(enumerate(host)), plan, part)
    assert torch.equal(pool, expected)


def test_a_planned_decode_has_every_needed_row() -> None:
    """Plan, copy, look: at each layer call the slots hold exactly the rows of the experts the call needs."""
    generator = torch.Generator().manual_seed(1)
    cache = DeviceCache.empty(3, 8, capacity=6, staging=3, transient=2)
    host, pool = random_bytes(24, 256), random_bytes(cache.n_slots, 256, seed=1)
    for step in range(30):
        layer = step % 3
        ids = torch.randperm(8, generator=generator)[None, :2].int()
        plan = cache_plan_reference(cache, layer, ids, torch.randint(8, (2, 2), generator=generator).int())
        gather_rows(pool, addresses_of(host).view(3, 8), plan, "demand")
        assert torch.equal(pool[plan.slot_ids[0].long()], host[layer * 8 + ids[0].long()])
        gather_rows(pool, addresses_of(host).view(3, 8), plan, "prefetch")


def test_rows_without_an_address_and_keys_out_of_range_are_left_alone() -> None:
    host, pool = random_bytes(4, 128), random_bytes(4, 128, seed=1)
    before, row_of = pool.clone(), addresses_of(host)
    row_of[1] = 0
    gather_rows(pool, row_of.view(1, 4), plan_for([1, 4, -1, 2, 3], [0, 1, 2, 3, 4], 5))
    assert torch.equal(pool[:3], before[:3]) and torch.equal(pool[3], host[2])


def test_arguments_that_are_refused() -> None:
    pool, row_of, plan = random_bytes(4, 256), torch.zeros(1, 4, dtype=torch.int64), plan_for([0], [0], 1)
    for arguments, message in (
        ((pool, row_of, plan, "both"), "part='both' is unknown; choose demand, prefetch, all"),
        ((pool, row_of, plan, "all", 0), "n_programs = 0 must be at least 1"),
        ((pool.int(), row_of, plan), "pool is int32, expected uint8"),
        ((pool.T, row_of, plan), "pool has strides"),
        ((pool[:, :192], row_of, plan), "rows of 192 bytes, 256 apart"),
        ((pool.view(-1)[8:776].view(3, 256), row_of, plan), "pool starts 8 bytes past"),
        ((pool, row_of.int(), plan), "row_of is int32, expected int64"),
        ((pool, row_of.to("meta"), plan), "row_of is on meta"),
    ):
        with pytest.raises(KernelInputError, match=message):
            gather_launch(*arguments)
