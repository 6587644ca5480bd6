"""Results of a made-up comparison, whose arms are as fast and as good as they are asked to be."""

from __future__ import annotations

import numpy as np

from experiments.results import ArmResult, Quality, Results
from prefetch.trace import RoutingTrace

N_LAYERS, N_EXPERTS, TOP_K = 8, 32, 4
SPEEDS = {
    "no_cache": 9.0,
    "slru": 20.0,
    "popularity": 20.6,
    "previous_token": 22.0,
    "gate_reuse": 27.0,
    "oracle": 31.0,
    "all_resident": 44.0,
}
ACCURACIES = {"popularity": 0.3, "previous_token": 0.45, "gate_reuse": 0.8, "oracle": 1.0}
ROLES = {"slru": "baseline", "no_cache": "bound", "oracle": "bound", "all_resident": "bound"}


def make_results(slots_fraction: float = 0.25, name: str = "run", emulated: bool = False, n_repeats: int = 3) -> Results:
    """Seven arms over `n_repeats` repeats; more slots are faster, except where slots do not matter."""
    random = np.random.default_rng(7)
    drift = 1 + 0.05 * random.standard_normal(n_repeats)
    arms = {}
    for arm, at_a_quarter in SPEEDS.items():
        faster = 1.0 if arm in ("no_cache", "all_resident") else (slots_fraction / 0.25) ** 0.5
        speeds = at_a_quarter * faster * drift * (1 + 0.01 * random.standard_normal(n_repeats))
        trace = make_trace(ACCURACIES[arm]) if arm in ACCURACIES else None
        arms[arm] = ArmResult(
            role=ROLES.get(arm, "predictor"),
            repeats=[summary(speed, stall_s=max(0.0, 1 / speed - 1 / 44)) for speed in speeds.tolist()],
            quality=Quality.of(trace) if trace else None,
            lossless=True,
            emulated=emulated,
        )
    return Results(
        config={"seed": 0, "cache": {"slots": slots_fraction}, "predictors": ["popularity", "gate_reuse"]},
        provenance={"hardware": {"cpu": "a processor"}, "command": "python -m experiments.decode"},
        arms=arms,
        bounds={"belady_hit_rate_simulated": 0.73},
        slots=int(slots_fraction * N_LAYERS * N_EXPERTS),
        slots_fraction=slots_fraction,
        peak_rss_bytes=1_234_567_890,
        name=name,
    )


def summary(tokens_per_s: float, stall_s: float) -> dict[str, float]:
    """A repeat as `prefetch.accounting.summarise` would report it."""
    token_s = 1 / tokens_per_s
    rest_s = token_s - stall_s
    shares = {
        "stall": stall_s,
        "expert": 0.4 * rest_s,
        "predictor": 0.02 * rest_s,
        "overhead": 0.08 * rest_s,
        "dense": 0.5 * rest_s,
    }
    return {
        "ttft_s": 0.8,
        "tpot_mean_s": token_s,
        "tpot_median_s": token_s,
        "tpot_p95_s": 1.4 * token_s,
        "n_tokens": 256.0,
        "tokens_per_s": tokens_per_s,
        **{f"{part}_share": s / token_s for part, s in shares.items()},
        "hit_rate": 0.6,
        "prefetch_hit_rate": 0.2,
        "late_rate": 0.1,
        "miss_rate": 0.3,
        "in_place_rate": 0.0,
        "demand_bytes_per_token": 2.5e6,
        "useful_bytes_per_token": 1.5e6,
        "wasted_bytes_per_token": 0.4e6,
        "cancelled_bytes_per_token": 0.1e6,
        "link_utilisation": float("nan"),
    }


def make_trace(accuracy: float, n_tokens: int = 60) -> RoutingTrace:
    """Decode steps whose guesses name each true expert with probability `accuracy`; layer 0 is never predicted."""
    random = np.random.default_rng(int(accuracy * 100))
    ids = random.random((n_tokens, N_LAYERS, N_EXPERTS)).argsort(axis=2)
    right = random.random((n_tokens, N_LAYERS, TOP_K)) < accuracy
    guesses = np.where(right, ids[:, :, :TOP_K], ids[:, :, TOP_K : 2 * TOP_K]).astype(np.int16)
    guesses[:, 0] = -1
    resident = random.random((n_tokens, N_LAYERS, N_EXPERTS)) < 0.5
    step = np.arange(n_tokens, dtype=np.int32)
    return RoutingTrace(
        sequence=np.zeros(n_tokens, np.int32),
        step=step,
        phase=(step > 0).astype(np.uint8),
        token_ids=step,
        topk_ids=ids[:, :, :TOP_K].astype(np.uint16),
        topk_weights=np.full((n_tokens, N_LAYERS, TOP_K), 0.25, np.float32),
        n_experts=N_EXPERTS,
        guesses={1: guesses},
        resident={1: resident},
    )
