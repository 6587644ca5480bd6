"""Which tokens each expert of a layer call works on: out to the experts and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kernels.expert_mlp import weighted_sum


@dataclass(frozen=True)
class Dispatch:
    """The (token, rank) pairs of one layer call, grouped by expert. Pair p is rank p % k of token p // k."""

    pairs: dict[int, list[int]]  # needed experts in order of first appearance -> their pairs, in token order
    top_k: int

    @property
    def experts(self) -> list[int]:
        return list(self.pairs)

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [T * k]: all pairs, expert by expert. In NumPy, where so few numbers cost half of what they cost in PyTorch."""
        return np.array([pair for pairs in self.pairs.values() for pair in pairs])

    @cached_property
    def places(self) -> np.ndarray:
        """int64 [T * k]: where each pair stands in `order`."""
        places = np.empty_like(self.order)
        places[self.order] = np.arange(len(places))
        return places

    def inputs(self, hidden: Tensor) -> dict[int, Tensor]:
        """For each needed expert the states [n, H] of its tokens, out of `hidden` [T, H]."""
        if len(hidden) == 1:
            return dict.fromkeys(self.pairs, hidden)
        gathered = hidden.index_select(0, torch.from_numpy(self.order // self.top_k).to(hidden.device))
        parts = gathered.split([len(pairs) for pairs in self.pairs.values()])
        return dict(zip(self.pairs, parts, strict=True))

    def combine(self, rows: Mapping[int, Tensor], weights: Tensor) -> Tensor:
        """The layer's output [T, H], summed in routing order whatever the order in which `rows` were computed.

        Args:
            rows: for each needed expert its outputs [n, H], one a pair.
            weights: [T, k] routing weights, same dtype.
        """
        together = torch.cat([rows[expert] for expert in self.pairs])
        if len(weights) > 1:
            together = together.index_select(0, torch.from_numpy(self.places).to(together.device))
        return weighted_sum(together.view(*weights.shape, -1), weights)


def dispatch(topk_ids: Tensor) -> Dispatch:
    """Group the pairs of `topk_ids` [T, k] by expert; within an expert, pairs keep token order (fixed summation order)."""
    pairs: dict[int, list[int]] = {}
    for pair, expert in enumerate(topk_ids.flatten().tolist()):
        pairs.setdefault(expert, []).append(pair)
    return Dispatch(pairs, topk_ids.shape[1])
