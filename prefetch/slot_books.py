"""Which expert is in which slot: the fast tier's books, without its memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import torch

from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey, MoEGeometry


class SlotBooks:
    """`n_slots` equal places for one expert row each.

    A slot is free, or acquired (in flight, or draining), or owned: published for exactly one expert. `slot_of` only
    ever names published slots, so whoever reads it (kernels do) finds complete rows. One thread calls the methods.

    Attributes:
        n_slots: slots in all.
        slot_of: int32 [L, E], the slot of each published expert, -1 where absent; on the host.
    """

    def __init__(self, geometry: MoEGeometry, n_slots: int, on_release: Callable[[int], None] | None = None):
        check_n_slots(n_slots)
        self.n_slots = n_slots
        self._on_release = on_release
        self.slot_of = torch.full((geometry.n_layers, geometry.n_experts), -1, dtype=torch.int32)
        self._table = self.slot_of.numpy()  # the same memory; reading one entry costs a tenth of torch's time
        self._table_rows = [memoryview(row) for row in self._table]
        self._owner: list[ExpertKey | None] = [None] * n_slots
        self._is_free = [True] * n_slots
        self._free = list(range(n_slots))  # a heap

    @property
    def n_free(self) -> int:
        return len(self._free)

    def acquire(self) -> int | None:
        """Take the lowest free slot; None if there is none."""
        if not self._free:
            return None
        slot = heapq.heappop(self._free)
        self._is_free[slot] = False
        return slot

    def release(self, slot: int) -> None:
        """Give back an acquired slot that is not published."""
        if self._is_free[slot]:
            raise ValueError(f"slot {slot} is already free")
        if self._owner[slot] is not None:
            raise ValueError(f"slot {slot} still holds {self._owner[slot]}: unpublish it before its slot is released")
        if self._on_release is not None:
            self._on_release(slot)
        self._is_free[slot] = True
        heapq.heappush(self._free, slot)

    def publish(self, key: ExpertKey, slot: int) -> None:
        """Declare the row of `key` complete in `slot`, an acquired slot that nobody owns."""
        if self._is_free[slot] or self._owner[slot] is not None:
            raise ValueError(f"slot {slot} cannot take {key}: it is {self._owner[slot] or 'free'}")
        if self._table[key] >= 0:
            raise ValueError(f"{key} is in slot {self._table[key]}: it cannot be published in slot {slot} too")
        self._owner[slot] = key
        self._table[key] = slot

    def unpublish(self, key: ExpertKey) -> None:
        """Remove `key` from the table; its slot stays acquired. Nothing happens if `key` is not published."""
        slot = int(self._table[key])
        if slot >= 0:
            self._owner[slot] = None
            self._table[key] = -1

    def slots_of(self, layer: int) -> bytes:
        """A copy of `slot_of[layer]`: int32 [E] as bytes, which a layer call can afford to take."""
        return self._table_rows[layer].tobytes()


def check_n_slots(n_slots: int) -> None:
    """Raise CapacityError unless there is a slot."""
    if n_slots < 1:
        raise CapacityError(f"the fast tier has {n_slots} slots; it needs at least 1 (cache.slots)")
