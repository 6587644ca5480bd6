"""Which tokens each expert of a layer call works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """The (token, rank) pairs of one layer call, grouped by expert."""

    experts: list[int]  # needed experts, in order of first appearance over tokens, then ranks
    tokens: dict[int, Tensor] | None  # expert -> [n] token indices; None at one token
    pairs: dict[int, Tensor] | None  # expert -> [n] indices into the flattened [T * k] pairs


def dispatch(topk_ids: Tensor) -> Dispatch:
    """Group the pairs of `topk_ids` [T, k] by expert; within an expert, pairs keep token order (fixed summation order)."""
    n_tokens, top_k = topk_ids.shape
    if n_tokens == 1:
        return Dispatch(topk_ids[0].tolist(), None, None)
    flat = topk_ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
    groups = dict(zip(experts.tolist(), torch.split(order, counts.tolist()), strict=True))
    by_appearance = sorted(groups, key=lambda expert: int(groups[expert][0]))
    return Dispatch(by_appearance, {e: pairs // top_k for e, pairs in groups.items()}, groups)
