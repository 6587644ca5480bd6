"""What computing takes on the machine that a replay stands in for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds, all of decoding few tokens at once, where weights are read once a forward pass and cost more than arithmetic."""

    dense_s: float  # one layer outside of its MoE layer call: attention, norms, router, its share of the output head
    call_s: float  # one MoE layer call apart from what follows: launches, books
    expert_s: float  # one expert that is in a slot, whatever the number of its tokens
    load_s: float  # on top, for one that its layer waits for: its books, and being computed by itself
    predictor_s: float  # the predictor at one layer, planning included
    in_place_s: float | None  # one expert computed where it lies, by the CPU; None: not known
