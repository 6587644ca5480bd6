"""Policies on recorded routing of real models, against figures published with the recordings.

The recordings are not part of this repository: gpt-oss-20b from AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, and
Qwen3-30B-A3B on a phone, with the residency that its engine reported, from Helldez/BigMoeOnEdge.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from prefetch.cache.belady import belady_hits
from prefetch.cache.lru import Lru
from prefetch.cache.per_layer import PerLayer
from prefetch.cache.replay import replay_hits
from prefetch.geometry import ExpertKey

TRACES = Path(__file__).parents[3] / "../shared/traces"
pytestmark = pytest.mark.skipif(not TRACES.is_dir(), reason=f"recorded routing is not at {TRACES}")

N_LAYERS, N_EXPERTS = 24, 32  # of gpt-oss-20b


@pytest.fixture(scope="module")
def sequences() -> list[list[list[ExpertKey]]]:
    """Every third sequence of mmlu_dev that does not loop, as routing events (token by token, layer by layer)."""
    folder = TRACES / "gpt-oss-20b"
    recorded = np.load(folder / "mmlu_dev.npz")
    loops = [json.loads(line)["repetition"] for line in (folder / "mmlu_dev.meta.jsonl").read_text().splitlines()]
    keys = [[ExpertKey(layer, expert) for expert in range(N_EXPERTS)] for layer in range(N_LAYERS)]
    spans = np.stack([recorded["offsets"][:-1], recorded["offsets"][1:]], axis=1)
    found = []
    for start, end in spans[~np.array(loops)][::3]:
        tokens = recorded["ids"][start:end].tolist()
        found.append([[keys[layer][expert] for expert in token[layer]] for token in tokens for layer in range(N_LAYERS)])
    return found


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
    with open(TRACES / "on-device-qwen3-30b/qwen.route.csv") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    expert_bytes = {int(row["layer"]): int(row["expert_bytes"]) for row in rows if row["expert_bytes"] != "0"}
    budget_bytes, resident_bytes = 4000 * 2**20, 0
    cache = Lru(capacity=48 * 128)
    n_decode = n_agree = 0
    for row in rows:
        key = ExpertKey(int(row["layer"]), int(row["expert"]))
        hit = key in cache
        if hit:
            cache.access(key)
        else:
            cache.insert(key)
            resident_bytes += expert_bytes[key.layer]
        while resident_bytes > budget_bytes:
            victim = next(iter(cache))
            cache.remove(victim)
            resident_bytes -= expert_bytes[victim.layer]
        if row["phase"] == "1":
            n_decode += 1
            n_agree += hit == (row["residency"] != "0")
    assert n_decode == 128 * 48 * 6
    assert n_agree / n_decode >= 0.999
    assert resident_bytes / 2**20 == pytest.approx(3997.7, abs=0.1)
