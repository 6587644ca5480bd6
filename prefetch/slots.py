"""The fast tier's memory: equal expert-sized slots in one allocation; and how many of them a capacity means."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from prefetch.errors import CapacityError
from prefetch.geometry import MoEGeometry
from prefetch.memory import allocate_pages
from prefetch.slot_books import SlotBooks, check_n_slots

BYTE_UNITS = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
CAPACITY_FORMS = 'a count (64), a fraction of all experts (0.25), or bytes ("12GB", "512MiB")'


class SlotPool(SlotBooks):
    """Slots that are memory. Other threads write into `buffer(slot)` of acquired slots.

    Attributes:
        rows: uint8 [n_slots, row_bytes] on `device`.
    """

    def __init__(
        self,
        geometry: MoEGeometry,
        n_slots: int,
        device: torch.device | str = "cpu",
        on_release: Callable[[int], None] | None = None,
    ):
        check_n_slots(n_slots)
        self.rows = _allocate(n_slots, geometry.expert.row_bytes, torch.device(device))  # first: too many end here
        super().__init__(geometry, n_slots, on_release)
        self._operands = [geometry.expert.operands(row) for row in self.rows]  # made once: a layer call must not pay for views

    def address(self, slot: int) -> int:
        """Where the slot's `row_bytes` bytes are, in the memory of the pool's device."""
        return self.rows.data_ptr() + slot * self.rows.stride(0)

    def buffer(self, slot: int) -> memoryview:
        """The slot's bytes: themselves, page-aligned, where the CPU can reach them, else a copy of them."""
        return self.rows[slot].cpu().numpy().data

    def operands(self, slot: int) -> tuple[Tensor, Tensor]:
        """gate_up.t() [H, 2I] and down.t() [I, H]: views into the slot, or dequantised from it."""
        return self._operands[slot]()


def parse_slots(spec: int | float | str, geometry: MoEGeometry, option: str) -> int:
    """How many slots a capacity means.

    Args:
        spec: an int is a count (1 is one slot), a float a fraction of all experts (1.0 is all of them, rounded down), a
            string either of them or bytes: "12GB" (10^9), "512MiB" (2^20). Bytes are a budget: more than all
            experts need means all experts.
        geometry: the model's experts.
        option: where the user wrote it, for the error.

    Raises:
        CapacityError: anything else, less than one slot, or more than all experts; naming `option`.
    """
    if isinstance(spec, str):
        return _parse_text(spec.strip(), geometry, option)
    if isinstance(spec, bool) or not isinstance(spec, int | float):
        raise CapacityError(f"{option}={spec} is not {CAPACITY_FORMS}")
    return _from_count(spec, geometry, option) if isinstance(spec, int) else _from_fraction(spec, geometry, option)


def parse_bytes(text: str, option: str) -> int:
    """How many bytes "12GB" (10^9) or "512MiB" (2^20) mean.

    Raises:
        CapacityError: `text` is neither, naming `option`.
    """
    number, unit = _number_and_unit(str(text).strip())
    if unit not in BYTE_UNITS or float(number) <= 0:
        raise CapacityError(f'{option}={text} is not a size in bytes, such as "12GB" or "512MiB"')
    return int(float(number) * BYTE_UNITS[unit])


def _number_and_unit(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)\s*([a-z]*)", text.lower())
    number, unit = match.groups() if match else ("", "")
    return number, unit.upper()


def _parse_text(text: str, geometry: MoEGeometry, option: str) -> int:
    number, unit = _number_and_unit(text)
    if unit in BYTE_UNITS:
        return _from_bytes(float(number) * BYTE_UNITS[unit], text, geometry, option)
    if not number or unit:
        raise CapacityError(f"{option}={text} is not {CAPACITY_FORMS}")
    if number.lstrip("-").isdigit():
        return _from_count(int(number), geometry, option)
    return _from_fraction(float(number), geometry, option)


def _from_count(count: int, geometry: MoEGeometry, option: str) -> int:
    if not 1 <= count <= geometry.n_total:
        raise CapacityError(f"{option}={count} is not between 1 slot and all {geometry.n_total} experts")
    return count


def _from_fraction(fraction: float, geometry: MoEGeometry, option: str) -> int:
    if not 0 < fraction <= 1:
        raise CapacityError(f"{option}={fraction} is not a fraction of all experts: above 0, at most 1.0")
    n_slots = math.floor(fraction * geometry.n_total + 1e-9)  # 0.29 * 100 is 28.999...
    if n_slots < 1:
        raise CapacityError(f"{option}={fraction} of {geometry.n_total} experts is less than one slot")
    return n_slots


def _from_bytes(n_bytes: float, text: str, geometry: MoEGeometry, option: str) -> int:
    row_bytes = geometry.expert.row_bytes
    if n_bytes < row_bytes:
        raise CapacityError(f"{option}={text} is less than one slot: an expert of this model takes {row_bytes} bytes")
    return min(int(n_bytes // row_bytes), geometry.n_total)


def _allocate(n_slots: int, row_bytes: int, device: torch.device) -> Tensor:
    """The only place that knows where slots live: uint8 [n_slots, row_bytes]."""
    purpose = f"a fast tier of {n_slots} slots (cache.slots)"
    if device.type == "cpu":
        pages = allocate_pages(n_slots * row_bytes, purpose)
        return torch.frombuffer(pages, dtype=torch.uint8).view(n_slots, row_bytes)
    try:
        rows = torch.empty(n_slots, row_bytes, dtype=torch.uint8, device=device)
        # The memory may be freed memory that kernels still use: copies come on streams of their own.
        torch.cuda.synchronize(device)
        return rows
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{purpose} needs {n_slots * row_bytes / 1e9:.2f} GB of {device}'s memory, which has not as much left: lower "
            "cache.slots, or raise backend.memory"
        ) from error
