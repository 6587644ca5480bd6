"""What the numbers of one device say of the targets: pure arithmetic over the check's JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scripts.gpu.forked import Row
from scripts.gpu.targets import (
    AHEAD_UP_TO_TOKENS,
    BEHIND_AT_MOST,
    COPY_ENGINE_BYTES_PER_S,
    DECODE_GAIN,
    TARGET_COPY_BYTES_PER_S,
    TARGET_DEVICE,
    TARGETS,
)

Found = dict[str, Any]


def judge(found: Found) -> Found:
    """`found` with its verdicts, and in each time the share of the device's copy rate."""
    rate = copy_bytes_per_s(found)
    for time in rows_of(found, "kernels "):
        time["share_of_copy"] = share_of_copy(time, rate)
    return found | {
        "verdicts": {
            "copy_bytes_per_s": rate,
            "targets": target_verdicts(found),
            "peers": peer_verdicts(found),
            "copy_engine": copy_engine_verdict(found),
            "decode": decode_verdicts(found),
        }
    }


def rows_of(found: Found, prefix: str) -> list[Row]:
    """All rows of the sections whose names begin so."""
    return [row for name, section in found["sections"].items() if name.startswith(prefix) for row in section["rows"]]


def us_of(time: Row) -> float | None:
    """The better of a time's two medians, or the one that there is."""
    if time["timing"] is None:
        return None
    return min(us for us in (time["timing"]["first_us"], time["timing"]["second_us"]) if us is not None)


def copy_bytes_per_s(found: Found) -> float | None:
    """Measured within the device's memory."""
    rows = rows_of(found, "copy rate")
    return rows[0]["bytes_per_s"] if rows else None


def share_of_copy(time: Row, rate: float | None) -> float | None:
    """Weights read a second, over the copy rate."""
    us = us_of(time)
    return None if us is None or rate is None or not time["touched_bytes"] else time["touched_bytes"] / (1e-6 * us) / rate


def target_verdicts(found: Found) -> list[Row]:
    """Targets beside what was measured. They were set for one device: only there they are met or missed; elsewhere the target is
    scaled by the copy rate, and what is measured stands beside that."""
    times = {(t["operation"], t["shape"], t["n_tokens"]): t for t in rows_of(found, "kernels ") if t["provider"] == "ours"}
    own, rate = TARGET_DEVICE in found["device"]["name"], copy_bytes_per_s(found)
    verdicts = []
    for (operation, shape, n_tokens), target_us in TARGETS.items():
        time = times.get((operation, shape, n_tokens))
        us = None if time is None else us_of(time)
        scaled_us = None if own or rate is None else target_us * TARGET_COPY_BYTES_PER_S / rate
        verdicts.append({
            "operation": operation, "shape": shape, "n_tokens": n_tokens, "target_us": target_us, "us": us,
            "met": us <= target_us if own and us is not None else None,
            "scaled_us": scaled_us, "met_scaled": None if us is None or scaled_us is None else us <= scaled_us,
            "share_of_roof": None if time is None else time["share_of_roof"],
            "share_of_copy": None if time is None else time["share_of_copy"],
        })  # fmt: skip
    return verdicts


def peer_verdicts(found: Found) -> list[Row]:
    """Our experts against the best provider of others, where both were timed, in turn."""
    by_case: dict[tuple[str, int], dict[str, Row]] = {}
    for time in rows_of(found, "kernels "):
        if time["operation"] == "experts" and time["timing"] is not None and time["provider"] != "read_only":
            by_case.setdefault((time["shape"], time["n_tokens"]), {})[time["provider"]] = time
    return [verdict for case, times in by_case.items() for verdict in _against_best(*case, times)]


def _against_best(shape: str, n_tokens: int, times: dict[str, Row]) -> Iterator[Row]:
    peers = {name: us for name, time in times.items() if not name.startswith("ours") and (us := us_of(time)) is not None}
    if not peers:
        return
    best = min(peers, key=peers.__getitem__)
    us = times[best]["ours_us"]
    if us is None:
        return
    allowed = 1.0 if n_tokens <= AHEAD_UP_TO_TOKENS else BEHIND_AT_MOST
    yield {
        "shape": shape, "n_tokens": n_tokens, "us": us, "best_peer": best, "best_peer_us": peers[best],
        "best_peer_captured": times[best]["timing"]["captured"], "allowed": allowed, "met": us <= allowed * peers[best],
    }  # fmt: skip


def copy_engine_verdict(found: Found) -> Row | None:
    """The fastest of the copy engine's ways."""
    rates = [row["bytes_per_s"] for row in rows_of(found, "transfers") if row["way"].startswith("copy engine")]
    if not rates:
        return None
    return {"bytes_per_s": max(rates), "target": COPY_ENGINE_BYTES_PER_S, "met": max(rates) >= COPY_ENGINE_BYTES_PER_S}


def decode_verdicts(found: Found) -> list[Row]:
    """Gate reuse over SLRU alone, and what an oracle makes of it: the bound."""
    verdicts = []
    for name, section in found["sections"].items():
        arms = {
            (row["driven_by"], row["arm"]): row["tokens_per_s"]
            for row in section["rows"]
            if name.startswith("decode ") and "arm" in row and row["tokens_per_s"] is not None
        }
        for driven_by in ("host", "device"):
            base, lru, gain, bound = (arms.get((driven_by, arm)) for arm in ("slru", "lru", "gate_reuse", "oracle"))
            if base is None or gain is None:
                continue
            oracle = None if bound is None else bound / base
            verdicts.append({
                "section": name, "driven_by": driven_by, "gate_reuse_over_slru": gain / base, "oracle_over_slru": oracle,
                "lru_over_slru": None if lru is None else lru / base,
                "target": DECODE_GAIN, "met": gain / base >= DECODE_GAIN, "oracle_allows_it": None if oracle is None else oracle >= DECODE_GAIN,
            })  # fmt: skip
    return verdicts


def wrong(found: Found) -> list[str]:
    """Sentences on kernels of this project whose results are wrong, on small problems or where they were timed."""
    sentences = []
    for row in rows_of(found, "correctness "):
        if row["ours"] and not row["passed"]:
            where = f"{row['provider']}, {row['shape']}, T={row['n_tokens']}, {row['dtype']}"
            sentences.append(f"{where}: {row['problem'] or _said(row)}")
    for time in rows_of(found, "kernels "):
        if time["provider"].startswith("ours") and time["right"] is False:
            where = f"{time['operation']} by {time['provider']}, {time['shape']}, T={time['n_tokens']}"
            sentences.append(f"{where}: {_said(time)} where it was timed")
    for run in rows_of(found, "tokens device-driven"):
        if not run["explained_by_rounding"]:
            sentences.append(
                f"tokens of the bundled model, predictor {run['predictor']}: {run['n_equal']} of {run['n_tokens']}"
            )
    return sentences


def _said(row: Row) -> str:
    """Numbers that JSON lacks come back from it as None."""
    error = "not a number" if row["error"] is None else f"{row['error']:.1e}"
    return f"error {error} > {row['tolerance']:.0e}"
