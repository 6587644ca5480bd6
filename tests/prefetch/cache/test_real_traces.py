"""Policies on recorded routing of real models, against figures published with the recordings; so the importers are tested too.

The recordings are not part of this repository: gpt-oss-20b from AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, and
Qwen3-30B-A3B on a phone, with the residency that its engine reported, from Helldez/BigMoeOnEdge.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prefetch.cache.belady import belady_hits
from prefetch.cache.lru import Lru
from prefetch.cache.per_layer import PerLayer
from prefetch.cache.replay import replay_hits
from prefetch.geometry import ExpertKey
from prefetch.trace_formats.big_moe_on_edge import BigMoeOnEdge
from prefetch.trace_formats.gpt_oss_fingerprints import GptOssFingerprints

TRACES = Path(__file__).parents[3] / "../shared/traces"
pytestmark = pytest.mark.skipif(not TRACES.is_dir(), reason=f"recorded routing is not at {TRACES}")

N_LAYERS = 24  # of gpt-oss-20b


@pytest.fixture(scope="module")
def sequences() -> list[list[list[ExpertKey]]]:
    """Every third sequence of mmlu_dev that does not loop, as routing events (token by token, layer by layer)."""
    trace = GptOssFingerprints().read(TRACES / "gpt-oss-20b/mmlu_dev.npz")
    events = trace.routing_events()
    bounds = [*np.flatnonzero(trace.step == 0).tolist(), trace.n_tokens]
    return [events[first * N_LAYERS : end * N_LAYERS] for first, end in list(zip(bounds, bounds[1:], strict=False))[::3]]


def hit_rate(counts: list[tuple[int, int]]) -> float:
    """Over all activations, from (hits, misses) of each sequence."""
    hits, misses = np.sum(counts, axis=0)
    return float(hits / (hits + misses))


@pytest.mark.parametrize(("slots_per_layer", "published"), [(8, 0.63), (16, 0.90)])
def test_lru_per_layer_on_gpt_oss(sequences: list[list[list[ExpertKey]]], slots_per_layer: int, published: float) -> None:
    """Each sequence starts with an empty cache. The published figures are rounded ("about")."""
    counts = []
    for events in sequences:
        replayed = replay_hits(PerLayer(N_LAYERS * slots_per_layer, N_LAYERS, Lru), events)
        counts.append((replayed.hits, replayed.misses))
    assert hit_rate(counts) == pytest.approx(published, abs=0.025)


def test_belady_per_layer_on_gpt_oss(sequences: list[list[list[ExpertKey]]]) -> None:
    counts = []
    for events in sequences:
        for layer in range(N_LAYERS):
            bound = belady_hits(events[layer::N_LAYERS], capacity=8)
            counts.append((bound.hits, bound.misses))
    assert hit_rate(counts) == pytest.approx(0.79, abs=0.025)


def test_lru_reproduces_the_residency_that_a_phone_recorded() -> None:
    """That engine's budget is in bytes and its experts differ in size, so the test itself decides when one must leave;
    which one, it reads off the LRU's order."""
    path = TRACES / "on-device-qwen3-30b/qwen.route.csv"
    trace = BigMoeOnEdge().read(path)
    rows = pd.read_csv(path, comment="#")
    recorded = iter(rows["residency"][rows["phase"] == 1] != 0)  # in the order of the activations below
    expert_bytes = json.loads(trace.metadata["row_bytes_per_layer"])
    budget_bytes, resident_bytes = 4000 * 2**20, 0
    cache = Lru(capacity=trace.n_layers * trace.n_experts)
    n_decode = n_agree = 0
    for forward, layer in product(trace.forwards(), range(trace.n_layers)):
        for expert in trace.topk_ids[forward.rows, layer].reshape(-1).tolist():
            key = ExpertKey(layer, expert)
            hit = key in cache
            if hit:
                cache.access(key)
            else:
                cache.insert(key)
                resident_bytes += expert_bytes[layer]
            while resident_bytes > budget_bytes:
                victim = next(iter(cache))
                cache.remove(victim)
                resident_bytes -= expert_bytes[victim.layer]
            if forward.step > 0:
                n_decode += 1
                n_agree += hit == next(recorded)
    assert n_decode == 128 * 48 * 6
    assert n_agree / n_decode >= 0.999
    assert resident_bytes / 2**20 == pytest.approx(3997.7, abs=0.1)
