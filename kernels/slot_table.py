"""Where an expert's weights are: the table that every expert kernel reads them through.

One of two forms, for L layers of E experts:
- slots: `slot_of` int32 [L, E] names a row of one pool, -1 where the expert is absent (`prefetch.slots.SlotPool` has this form);
- addresses: int64 [L, E], the byte address of the expert's row, 0 where absent: the row may be in any of several pools, in
  pinned host memory too, which a GPU reads across the link.

A row is `prefetch.geometry.ExpertGeometry`'s: gate_up [2I, H], then down [H, I]. The table lives on the device and may change
between launches. So its values are checked twice: on the host when an `ExpertTable` is made, and in the kernel, to which an
entry out of range means an absent expert: it writes zeros and raises the miss flag, and never reads there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FLOAT_DTYPES, check_aligned, check_at_most, check_tensor
from prefetch.errors import KernelInputError
from prefetch.geometry import TENSOR_ALIGNMENT, ExpertGeometry


@dataclass(frozen=True)
class ExpertTable:
    """A table and the memory it points into.

    Args:
        geometry: of every expert in the table.
        pools: uint8 [n_slots, row_bytes] each, rows any multiple of 128 bytes apart. Exactly one with the slot form. They
            are kept here so that no address outlives its memory.
        entries: int32 [L, E] slots, or int64 [L, E] addresses, on the device that computes.

    Raises:
        KernelInputError: pools that do not have the geometry's rows, are misaligned, or entries that point outside them.
            Reading the entries of a CUDA table waits for its device: make the table once, not once a layer.
    """

    geometry: ExpertGeometry
    pools: tuple[Tensor, ...]
    entries: Tensor

    def __post_init__(self) -> None:
        check_tensor("entries", self.entries, [None, None], [torch.int32, torch.int64], self.entries.device)
        if self.geometry.dtype not in FLOAT_DTYPES:
            raise KernelInputError(f"experts of {self.geometry.dtype}: these kernels read float32, float16 or bfloat16")
        if self.geometry.row_bytes >= 2**31:
            raise KernelInputError(f"one expert takes {self.geometry.row_bytes} bytes: kernels address 2^31 - 1 within a row")
        if not self.pools or (len(self.pools) > 1 and not self.by_address):
            raise KernelInputError(
                f"{len(self.pools)} pools: a table of slots names rows of exactly one; use addresses for several"
            )
        for index, pool in enumerate(self.pools):
            self._check_pool(f"pools[{index}]", pool)
        if self.entries.device.type != "meta":
            self._check_entries()

    @property
    def by_address(self) -> bool:
        return self.entries.dtype == torch.int64

    @property
    def n_layers(self) -> int:
        return int(self.entries.shape[0])

    @property
    def n_experts(self) -> int:
        return int(self.entries.shape[1])

    def arguments(self, layer: int) -> dict[str, Tensor | int | float | bool | None]:
        """What a kernel that calls `expert_rows` takes, for one layer. Offsets and strides are in elements."""
        check_at_most("layer + 1", layer + 1, "n_layers", self.n_layers)
        pool, n_bytes = self.pools[0], self.geometry.dtype.itemsize
        return {
            "entries_ptr": self.entries[layer],
            "pool_ptr": pool.view(self.geometry.dtype),
            "row_stride": pool.stride(0) // n_bytes,
            "n_slots": pool.shape[0],
            "n_experts": self.n_experts,
            "BY_ADDRESS": self.by_address,
        }

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor] | None:
        """gate_up [2I, H] and down [H, I] as views of the pool, or None where absent. Waits for the device: for references."""
        entry = int(self.entries[layer, expert])
        if entry == (0 if self.by_address else -1):
            return None
        row = self._row_at(entry) if self.by_address else self.pools[0][entry]
        size = self.geometry
        gate_up = row[: size.gate_up_bytes].view(size.dtype).view(size.gate_up_shape)
        return gate_up, row[size.down_offset : size.down_offset + size.down_bytes].view(size.dtype).view(size.down_shape)

    def _check_pool(self, name: str, pool: Tensor) -> None:
        check_tensor(name, pool, [None, self.geometry.row_bytes], [torch.uint8], pool.device, contiguous_dims=1)
        if not self.by_address and pool.device != self.entries.device:
            raise KernelInputError(
                f"{name} is on {pool.device} and the slot table on {self.entries.device}: put both on one device"
            )
        if pool.stride(0) % TENSOR_ALIGNMENT:
            raise KernelInputError(f"{name} has rows {pool.stride(0)} bytes apart: make it a multiple of {TENSOR_ALIGNMENT}")
        if pool.device.type == "cpu" and self.entries.device.type == "cuda" and not pool.is_pinned():
            raise KernelInputError(f"{name} is pageable host memory, which no GPU can read: pin it (Tensor.pin_memory)")
        check_aligned(name, pool)

    def _check_entries(self) -> None:
        """Every entry names a row: by one comparison for slots, by looking up its pool for addresses."""
        if not self.by_address:
            lowest, highest = (int(value) for value in torch.aminmax(self.entries))
            if lowest < -1 or highest >= self.pools[0].shape[0]:
                raise KernelInputError(
                    f"the slot table holds {lowest if lowest < -1 else highest}: slots are 0..{self.pools[0].shape[0] - 1}, -1 means absent"
                )
            return
        for address in self.entries.unique().tolist():
            if address:
                self._row_at(address)

    def _row_at(self, address: int) -> Tensor:
        for pool in self.pools:
            slot, rest = divmod(address - pool.data_ptr(), pool.stride(0))
            if rest == 0 and 0 <= slot < pool.shape[0]:
                return pool[slot]
        raise KernelInputError(f"the address table holds {address}, which is not where a row of the table's pools starts")


def addresses_of(pool: Tensor) -> Tensor:
    """int64 [n_slots] on the CPU: the byte address of each row of `pool` (uint8 [n_slots, row_bytes])."""
    return pool.data_ptr() + torch.arange(pool.shape[0], dtype=torch.int64) * pool.stride(0)


@triton.jit
def expert_rows(entries_ptr, pool_ptr, row_stride, n_slots, n_experts, expert, BY_ADDRESS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to the rows of `expert` (a scalar or a block of ids), and which of them are there.

    Ids below 0 are padding and ids from `n_experts` on do not exist: neither is there. Multiplying in 64 bits: a pool is
    larger than 2^31 elements.
    """
    known = (expert >= 0) & (expert < n_experts)
    if BY_ADDRESS:
        entry = tl.load(entries_ptr + expert, mask=known, other=0)
        there = entry != 0
        rows = entry.to(pool_ptr.dtype)
    else:
        entry = tl.load(entries_ptr + expert, mask=known, other=-1)
        there = (entry >= 0) & (entry < n_slots)
        rows = pool_ptr + entry.to(tl.int64) * row_stride
    return tl.multiple_of(rows, 16), there
