"""Routing where no recording of a model is at hand: generated, with the two properties that decide what a cache can do.

A token keeps each of its predecessor's experts with some probability and draws the others from a skewed popularity, layer by
layer. Published of Qwen3-30B-A3B: the token before used 42 to 47 % of a token's experts (imp #1360), and an LRU cache of 40 % of
the experts hits 90 to 95 % (imp #1359). With the defaults, 128 experts and top-8 they are 48 and 88 %. Real routing has topics
and structure between layers besides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class RoutingStatistics:
    """What the routing is made of."""

    kept: float = 0.1  # probability that an expert of the token before is used again
    skew: float = 1.5  # popularity of the r-th expert of a layer ~ r^-skew


def generated_routing(
    n_tokens: int, n_layers: int, n_experts: int, top_k: int, statistics: RoutingStatistics, seed: int
) -> Ids:
    """[n_tokens, L, k], distinct experts for each token and layer."""
    random = np.random.default_rng(seed)
    popularity = _popularity(n_layers, n_experts, statistics, random)
    ids = np.empty((n_tokens, n_layers, top_k), dtype=np.int64)
    for layer in range(n_layers):
        for token in range(n_tokens):
            before = ids[token - 1, layer] if token else ids[0, layer, :0]
            kept = before[random.random(len(before)) < statistics.kept]
            ids[token, layer] = _filled_up(kept, top_k, popularity[layer], random)
    return ids


def guesses_of(routing: Ids, n_experts: int, recall: float, statistics: RoutingStatistics, seed: int) -> Ids:
    """As many guesses as there are experts, [n_tokens, L, k]: each expert of `routing` is among them with probability `recall`,
    the others are drawn by popularity from those that are not needed."""
    random = np.random.default_rng(seed)
    popularity = _popularity(routing.shape[1], n_experts, statistics, np.random.default_rng(seed))
    guesses = np.empty_like(routing)
    for token, layers in enumerate(routing):
        for layer, needed in enumerate(layers):
            right = needed[random.random(len(needed)) < recall]
            others = popularity[layer].copy()
            others[needed] = 0
            guesses[token, layer] = _filled_up(right, len(needed), others, random)
    return guesses


def _popularity(
    n_layers: int, n_experts: int, statistics: RoutingStatistics, random: np.random.Generator
) -> NDArray[np.float64]:
    """[L, E], each layer's in an order of its own."""
    by_rank = np.arange(1, n_experts + 1) ** -statistics.skew
    return np.stack([random.permutation(by_rank) for _ in range(n_layers)])


def _filled_up(chosen: Ids, n_wanted: int, popularity: NDArray[np.float64], random: np.random.Generator) -> Ids:
    """`chosen` and further experts, drawn by popularity without replacement (Gumbel top-k)."""
    scores = np.log(np.maximum(popularity, 1e-300)) + random.gumbel(size=len(popularity))
    scores[chosen] = -np.inf
    missing = n_wanted - len(chosen)
    further = np.argpartition(-scores, missing - 1)[:missing] if missing else chosen[:0]
    return np.concatenate([chosen, further])
