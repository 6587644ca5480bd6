"""What a run's tables add up to: the identities that must hold, and the run's headline metrics.

Every metric is defined, with formula and unit, in docs/method.md.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from prefetch.recorder import RunRecord

PRELOAD = "preload"  # brought in before the first token, for no forward pass in particular
OUTCOMES = ("demand", "useful", "wasted", "cancelled", "failed", PRELOAD)
CALL_PARTS = ("stall", "expert", "predictor", "overhead")
TIME_PARTS = (*CALL_PARTS, "dense")  # of a token; dense = everything outside MoE layer calls
CLOCK_TOLERANCE_S = 1e-6  # sums of perf_counter differences, rounded in float64
WALL_TOLERANCE = 0.02  # of a run's wall time: what a clock around the run may see besides prefill and decode


def violations(record: RunRecord, *, moved_bytes: int | None = None, wall_s: float | None = None) -> list[str]:
    """Every accounting identity the run breaks, in words; empty when all hold.

    Args:
        record: tables of one finished run.
        moved_bytes: what the backing tier itself counted, where it counts.
        wall_s: what one clock around all prompts measured, where there was one.
    """
    return [
        *activation_violations(record.calls),
        *byte_violations(record.transfers, moved_bytes),
        *transfer_violations(record),
        *time_violations(record, wall_s),
    ]


def activation_violations(calls: pd.DataFrame) -> list[str]:
    """hits + late + misses == needed, in every layer call; no count is negative; only misses are computed in place."""
    found = calls["hits"] + calls["late"] + calls["misses"]
    counts = calls[["needed", "hits", "late", "misses", "in_place"]]
    return [
        *_report(calls, found != calls["needed"], "hits + late + misses differ from the experts needed"),
        *_report(calls, (counts < 0).any(axis=1), "a negative count of experts"),
        *_report(calls, calls["in_place"] > calls["misses"], "more experts computed in place than missed"),
    ]


def byte_violations(transfers: pd.DataFrame, moved_bytes: int | None = None) -> list[str]:
    """demand + useful + wasted + cancelled + failed + preload bytes == bytes moved, and each transfer moved what its outcome says."""
    complete = transfers["outcome"].isin(("demand", "useful", "wasted", PRELOAD))
    short, over = transfers["moved_bytes"] < transfers["n_bytes"], transfers["moved_bytes"] > transfers["n_bytes"]
    found = [
        *_report(transfers, ~transfers["outcome"].isin(OUTCOMES), "a transfer without a known outcome"),
        *_report(transfers, complete & short, "a completed transfer that did not move all of its bytes"),
        *_report(transfers, over | (transfers["moved_bytes"] < 0), "a transfer that moved more than its bytes, or less than 0"),
    ]
    accounted = sum(_bytes_by_outcome(transfers).values())
    if moved_bytes is not None and accounted != moved_bytes:
        found.append(f"bytes by outcome add up to {accounted}, but {moved_bytes} were moved")
    return found


def transfer_violations(record: RunRecord) -> list[str]:
    """Layer calls and transfers tell the same story: one demand load per miss that was not computed in place, one late
    prefetch per late expert, no more prefetch hits than hits. Preloads come before the first forward pass, and no expert twice."""
    preloads, transfers = (record.transfers[is_preload(record.transfers) == which] for which in (True, False))
    loaded = int((record.calls["misses"] - record.calls["in_place"]).sum())
    pairs = [
        (loaded, int((transfers["outcome"] == "demand").sum()), "misses to be loaded", "demand loads"),
        (int(record.calls["late"].sum()), int(transfers["late"].sum()), "late experts", "late prefetches"),
    ]
    found = [f"{a} {a_name}, but {b} {b_name}" for a, b, a_name, b_name in pairs if a != b]
    in_time, hits = int(_arrived_in_time(record.transfers).sum()), int(record.calls["hits"].sum())
    if in_time > hits:
        found.append(f"{in_time} prefetches used on time, but only {hits} hits")
    return [
        *found,
        *_report(preloads, preloads["submitted_s"] >= 0, "a preload after the first forward pass had begun"),
        *_report(preloads, preloads.duplicated(["layer", "expert"]), "an expert preloaded twice"),
    ]


def time_violations(record: RunRecord, wall_s: float | None = None) -> list[str]:
    """stall + expert + predictor + overhead == layer call, calls lie inside their forward pass (so that dense >= 0), and
    prefill and decode together take `wall_s` within 2 %."""
    calls, forwards = record.calls, record.forwards
    parts = calls[[f"{part}_s" for part in CALL_PARTS]]
    gap = (parts.sum(axis=1) - calls["total_s"]).abs()
    found = [
        *_report(calls, gap > CLOCK_TOLERANCE_S, "parts of a layer call that do not add up to its time"),
        *_report(calls, (parts < -CLOCK_TOLERANCE_S).any(axis=1), "a negative time"),
    ]
    spans = forwards.assign(end_s=forwards["start_s"] + forwards["wall_s"])[["sequence", "step", "start_s", "end_s"]]
    joined = calls.merge(spans, on=["sequence", "step"], how="left", suffixes=("", "_forward"))
    inside = (joined["start_s"] >= joined["start_s_forward"] - CLOCK_TOLERANCE_S) & (
        joined["start_s"] + joined["total_s"] <= joined["end_s"] + CLOCK_TOLERANCE_S
    )
    found += _report(joined, ~inside & joined["start_s"].notna(), "a layer call outside its forward pass")
    total_s = sum(_wall_s(forwards, phase) for phase in ("prefill", "decode"))
    if wall_s is not None and abs(total_s - wall_s) > WALL_TOLERANCE * wall_s:
        found.append(
            f"prefill and decode took {total_s:.6f} s, but the run {wall_s:.6f} s: more than {WALL_TOLERANCE:.0%} apart"
        )
    return found


def summarise(record: RunRecord, link_bytes_per_s: float | None = None) -> dict[str, float]:
    """The headline metrics of one run. Names carry units; figures are of the decode phase, of prefill where named so.

    Args:
        record: tables of one finished run.
        link_bytes_per_s: the rate that `link_utilisation` is a share of (emulated link, or measured); else it is NaN.

    Returns:
        Plain floats; NaN where a run holds nothing to measure (no decode steps, no layer calls).
    """
    prefill, decode = (_phase(record, phase, link_bytes_per_s) for phase in ("prefill", "decode"))
    step_s = decode_step_s(record.forwards)
    prompt_s = record.forwards.loc[record.forwards["phase"] == "prefill", "wall_s"].to_numpy(dtype=float)
    return {
        "ttft_s": _quantile(prompt_s, 0.5),
        "tpot_mean_s": float(np.mean(step_s)) if len(step_s) else np.nan,
        "tpot_median_s": _quantile(step_s, 0.5),
        "tpot_p95_s": _quantile(step_s, 0.95),
        **decode,
        **{f"prefill_{name}": value for name, value in prefill.items()},
        "preload_bytes": float(_bytes_by_outcome(record.transfers)[PRELOAD]),
    }


def decode_step_s(forwards: pd.DataFrame) -> np.ndarray:
    """Seconds from the end of one forward pass to the end of the next of the same sequence: what a reader waits per token.

    It holds what happens between forward passes too (choosing the token, the loop around the model).
    """
    ordered = forwards.sort_values(["sequence", "step"], kind="stable")
    end_s = ordered["start_s"] + ordered["wall_s"]
    since_last_s = end_s - end_s.groupby(ordered["sequence"]).shift()
    first_known_s = since_last_s.fillna(ordered["wall_s"])  # a decode step whose predecessor is not in the record
    return first_known_s[ordered["phase"] == "decode"].to_numpy(dtype=float)


def is_preload(transfers: pd.DataFrame) -> pd.Series:
    """Which transfers were made before the first token, for no forward pass in particular."""
    return transfers["outcome"] == PRELOAD


def intended_step(transfers: pd.DataFrame) -> pd.Series:
    """The forward pass a transfer is for: a prefetch whose lookahead reaches below layer 0 is for the next one."""
    return transfers["step"] + (transfers["lookahead"] > transfers["layer"])


def _phase(record: RunRecord, phase: str, link_bytes_per_s: float | None) -> dict[str, float]:
    """Times, shares, rates and bytes of one phase, without a prefix."""
    calls, forwards = (table[table["phase"] == phase] for table in (record.calls, record.forwards))
    in_phase = (intended_step(record.transfers) > 0) == (phase == "decode")
    transfers = record.transfers[in_phase & ~is_preload(record.transfers)]
    n_tokens = int(forwards["n_tokens"].sum())
    wall_s = _wall_s(record.forwards, phase)
    # Not known, and so NaN, in a device-driven run.
    seconds = {part: float(calls[f"{part}_s"].sum(skipna=False)) for part in CALL_PARTS}
    seconds["dense"] = wall_s - float(calls["total_s"].sum(skipna=False))
    needed = calls["needed"].sum()
    n_bytes = {outcome: n for outcome, n in _bytes_by_outcome(transfers).items() if outcome != PRELOAD}
    return {
        "n_tokens": float(n_tokens),
        "wall_s": wall_s,
        "tokens_per_s": _share(n_tokens, wall_s),
        **{f"{part}_share": _share(s, wall_s) for part, s in seconds.items()},
        "hit_rate": _share(calls["hits"].sum(), needed),
        "prefetch_hit_rate": _share(_arrived_in_time(transfers).sum(), needed),
        "late_rate": _share(calls["late"].sum(), needed),
        "miss_rate": _share(calls["misses"].sum(), needed),
        "in_place_rate": _share(calls["in_place"].sum(), needed),
        **{f"{outcome}_bytes_per_token": _share(n, n_tokens) for outcome, n in n_bytes.items()},
        "transfer_share": _share(_covered_s(transfers), wall_s),
        "link_utilisation": _share(sum(n_bytes.values()), wall_s * (link_bytes_per_s or 0)),
    }


def _wall_s(forwards: pd.DataFrame, phase: str) -> float:
    if phase == "decode":
        return float(decode_step_s(forwards).sum())
    return float(forwards.loc[forwards["phase"] == phase, "wall_s"].sum())


def _bytes_by_outcome(transfers: pd.DataFrame) -> dict[str, int]:
    moved = transfers.groupby("outcome")["moved_bytes"].sum()
    return {outcome: int(moved.get(outcome, 0)) for outcome in OUTCOMES}


def _covered_s(transfers: pd.DataFrame) -> float:
    """Seconds during which at least one transfer was under way: the length of the union of their intervals. NaN where they are not known."""
    begun = transfers[transfers["moved_bytes"] > 0].sort_values("started_s")
    start_s, end_s = begun["started_s"].to_numpy(dtype=float), begun["finished_s"].cummax().to_numpy(dtype=float)
    if not len(begun):
        return 0.0
    gaps_s = np.maximum(0.0, start_s[1:] - end_s[:-1])
    return float(end_s[-1] - start_s[0] - gaps_s.sum())


def _arrived_in_time(transfers: pd.DataFrame) -> pd.Series:
    return (transfers["outcome"] == "useful") & ~transfers["late"].astype(bool)


def _quantile(values: np.ndarray, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else float("nan")


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def _report(table: pd.DataFrame, wrong: pd.Series, what: str) -> list[str]:
    """One line for all rows that break a rule, naming the first."""
    if not wrong.any():
        return []
    first = table[wrong].iloc[0]
    where = ", ".join(f"{name} {first[name]}" for name in ("sequence", "step", "layer", "expert") if name in table)
    return [f"{what}: {int(wrong.sum())} of {len(table)} rows, first at {where}"]
