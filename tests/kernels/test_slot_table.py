"""Expert tables that are refused, and the rows that the others name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.slot_table import ExpertTable, addresses_of
from prefetch.errors import KernelInputError
from prefetch.geometry import ExpertGeometry, MoEGeometry
from prefetch.slots import SlotPool

GEOMETRY = ExpertGeometry(24, 10, torch.float16)  # rows of 4096 bytes


def make_pool(n_slots: int = 4, row_bytes: int = GEOMETRY.row_bytes) -> Tensor:
    return torch.arange(n_slots * row_bytes, dtype=torch.int64).to(torch.uint8).view(n_slots, row_bytes)


def test_rows_are_those_of_the_runtime() -> None:
    """The runtime's `SlotPool` writes a slot's bytes; its own views and a table's must be the same weights."""
    slots = SlotPool(MoEGeometry(1, 3, 1, GEOMETRY), 2)
    slots.buffer(1)[:] = bytes(index * 7 % 64 for index in range(GEOMETRY.row_bytes))
    pool = torch.stack([torch.frombuffer(slots.buffer(slot), dtype=torch.uint8) for slot in range(2)])
    for entries in (torch.tensor([[-1, 1, -1]]).int(), torch.tensor([[0, int(addresses_of(pool)[1]), 0]])):
        table = ExpertTable(GEOMETRY, (pool,), entries)
        found = table.expert(0, 1)
        assert found is not None and table.expert(0, 0) is None
        assert all(torch.equal(ours.t(), theirs) for ours, theirs in zip(found, slots.operands(1), strict=True))


def test_addresses_of_rows_that_lie_apart() -> None:
    pool = make_pool(6)[::2]
    for slot, address in enumerate(addresses_of(pool).tolist()):
        assert address == pool[slot].data_ptr()


@pytest.mark.parametrize("slot", [-2, 4])
def test_slot_out_of_range_is_refused(slot: int) -> None:
    with pytest.raises(KernelInputError, match=f"slot table holds {slot}: slots are 0..3, -1 means absent"):
        ExpertTable(GEOMETRY, (make_pool(),), torch.tensor([[0, slot, -1]]).int())


@pytest.mark.parametrize("offset", [1, 2048, 4 * 4096, -4096])
def test_address_that_is_no_row_is_refused(offset: int) -> None:
    pool = make_pool()
    with pytest.raises(KernelInputError, match="not where a row of the table's pools starts"):
        ExpertTable(GEOMETRY, (pool, make_pool(1)), torch.tensor([[0, pool.data_ptr() + offset]]))


def test_pools_that_are_refused() -> None:
    slots = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(KernelInputError, match=r"pools\[0\] has shape \[4, 8192\], expected \[any, 4096\]"):
        ExpertTable(GEOMETRY, (make_pool(row_bytes=8192),), slots)  # rows of another geometry
    with pytest.raises(KernelInputError, match="2 pools: .* use addresses"):
        ExpertTable(GEOMETRY, (make_pool(), make_pool()), slots)
    with pytest.raises(KernelInputError, match="0 pools"):
        ExpertTable(GEOMETRY, (), slots.long())
    with pytest.raises(KernelInputError, match="starts 8 bytes past a multiple of 16"):
        ExpertTable(GEOMETRY, (make_pool().view(-1)[8 : 8 + 3 * 4096].view(3, 4096),), slots)
    with pytest.raises(KernelInputError, match="rows 4104 bytes apart"):
        ExpertTable(GEOMETRY, (make_pool(5).as_strided((4, 4096), (4104, 1)),), slots)
    with pytest.raises(KernelInputError, match="is float16, expected uint8"):
        ExpertTable(GEOMETRY, (torch.zeros(4, 4096, dtype=torch.float16),), slots)
    with pytest.raises(KernelInputError, match="is on cpu and the slot table on meta"):
        ExpertTable(GEOMETRY, (make_pool(),), slots.to("meta"))


def test_entries_and_dtypes_that_are_refused() -> None:
    with pytest.raises(KernelInputError, match="entries is int16, expected int32 or int64"):
        ExpertTable(GEOMETRY, (make_pool(),), torch.zeros(1, 2, dtype=torch.int16))
    with pytest.raises(KernelInputError, match=r"entries has shape \[2\]"):
        ExpertTable(GEOMETRY, (make_pool(),), torch.zeros(2, dtype=torch.int32))
    doubles = ExpertGeometry(24, 10, torch.float64)
    with pytest.raises(KernelInputError, match="experts of torch.float64"):
        ExpertTable(doubles, (make_pool(row_bytes=doubles.row_bytes),), torch.zeros(1, 2, dtype=torch.int32))
    huge = ExpertGeometry(2**15, 2**15, torch.float16)
    with pytest.raises(KernelInputError, match="kernels address 2\\^31 - 1 within a row"):
        ExpertTable(
            huge, (torch.empty(1, huge.row_bytes, dtype=torch.uint8, device="meta"),), torch.zeros(1, 2, dtype=torch.int32)
        )
