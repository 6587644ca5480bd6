"""One device's JSON as Markdown tables: for the terminal while it grows, and for the page."""

from __future__ import annotations

from typing import Any

from scripts.gpu.forked import Row
from scripts.gpu.targets import TARGET_DEVICE, TARGETS
from scripts.gpu.verdicts import rows_of

NOT_MEASURED = "not measured"
Found = dict[str, Any]


def device_tables(found: Found) -> list[str]:
    """Everything that the page shows of one device."""
    device, verdicts = found["device"], found["verdicts"]
    parts = [device_line(device, verdicts["copy_bytes_per_s"]), targets_table(verdicts["targets"], device["name"])]
    checks = rows_of(found, "correctness ")
    if checks:
        parts.append(f"Correct against float64: {sum(row['passed'] for row in checks)} of {len(checks)} checks.")
    for run in rows_of(found, "tokens device-driven"):
        equal = (
            f"{run['n_equal']} of {run['n_tokens']} as by transformers{'' if run['explained_by_rounding'] else ', UNEXPLAINED'}"
        )
        parts.append(f"Tokens of the bundled model, device-driven, predictor {run['predictor']}: {equal}.")
    if verdicts["peers"]:
        parts.append(peers_table(verdicts["peers"]))
    for name, section in found["sections"].items():
        if name.startswith("decode ") and any("arm" in row for row in section["rows"]):
            parts.append(decode_table(section["rows"]))
    if verdicts["decode"]:
        parts.append(gains_table(verdicts["decode"]))
    if rows_of(found, "transfers"):
        parts.append(transfers_table(rows_of(found, "transfers"), verdicts["copy_engine"]))
    missing = {name: section["stopped"] for name, section in found["sections"].items() if section["stopped"]} | found["skipped"]
    if missing:
        parts.append("Incomplete: " + "; ".join(f"{name} ({reason})" for name, reason in missing.items()) + ".")
    return parts


def section_table(name: str, rows: list[Row]) -> str:
    """What a section found, for the terminal."""
    if name.startswith("kernels "):
        return "\n\n".join(times_table([row for row in rows if row["operation"] == o]) for o in _seen(rows, "operation"))
    if name.startswith("correctness "):
        return correctness_table(rows)
    if name.startswith("decode "):
        return decode_table(rows)
    if name.startswith("transfers"):
        return transfers_table(rows, None)
    return "\n".join(", ".join(f"{key} {value}" for key, value in row.items() if key != "results") for row in rows)


def device_line(device: Row, copy_bytes_per_s: float | None) -> str:
    """Name, size, versions."""
    versions, reported = device["provenance"]["versions"], device["reported"]
    shown = [f"{package} {versions[package]}" for package in ("torch", "triton", "transformers") if package in versions]
    rate = NOT_MEASURED if copy_bytes_per_s is None else f"{copy_bytes_per_s / 1e12:.2f} TB/s"
    return (
        f"**{device['name']}**, {device['memory_bytes'] / 1e9:.0f} GB, {device['multiprocessors']} multiprocessors, copies at {rate}; "
        f"driver {reported.get('driver_version', 'unknown')}, CUDA {device['cuda']}, ptxas {device['ptxas']}, {', '.join(shown)}"
    )


def targets_table(verdicts: list[Row], device: str) -> str:
    """Every target, what was measured of it, and the roof there; met or missed on the device that the targets were set for alone."""
    own = TARGET_DEVICE in device
    rows = [["operation", "model", "tokens", f"target us ({TARGET_DEVICE})", "measured us", "of the roof", "of the copy rate"]]
    if not own:
        rows[0].insert(4, "scaled by the copy rate")
    for verdict in verdicts:
        reached = verdict["met"] if own else verdict["met_scaled"]
        said = "" if reached is None else f" ({('met' if reached else 'missed') if own else ('below' if reached else 'above')})"
        measured = NOT_MEASURED if verdict["us"] is None else f"{verdict['us']:.1f}{said}"
        row = [verdict["operation"], verdict["shape"], str(verdict["n_tokens"]), f"{verdict['target_us']:g}", measured]
        row += [_percent(verdict["share_of_roof"]), _percent(verdict["share_of_copy"])]
        if not own:
            row.insert(4, "" if verdict["scaled_us"] is None else f"{verdict['scaled_us']:.1f}")
        rows.append(row)
    return table(rows)


def unmeasured_targets() -> str:
    """The targets alone."""
    rows = [["operation", "model", "tokens", f"target us ({TARGET_DEVICE})", "measured us"]]
    return table(rows + [[operation, shape, str(n), f"{us:g}", NOT_MEASURED] for (operation, shape, n), us in TARGETS.items()])


def times_table(times: list[Row]) -> str:
    """One operation's providers at one shape."""
    first = times[0]
    rows = [["provider", "us, twice", "of the roof", "of the copy rate", "error", "replays"]]
    for time in times:
        if time["timing"] is None:
            rows.append([time["provider"], f"{NOT_MEASURED}: {time['skipped']}", "", "", "", ""])
            continue
        timing = time["timing"]
        second = f"{NOT_MEASURED}: {timing['no_second']}" if timing["second_us"] is None else f"{timing['second_us']:.1f}"
        us = f"{timing['first_us']:.1f}, {second}{'' if timing['captured'] else ' eager'}"
        error = "" if time["error"] is None else f"{time['error']:.0e}"
        shares = _percent(time["share_of_roof"]), _percent(time.get("share_of_copy"))
        rows.append([time["provider"], us, *shares, error, str(timing["n_replays"])])
    return f"{first['operation']}, {first['shape']}, {first['n_tokens']} tokens:\n\n" + table(rows)


def correctness_table(rows: list[Row]) -> str:
    """The worst error of each provider and dtype."""
    dtypes = _seen(rows, "dtype")
    lines = [["provider", "passed", *dtypes, "could not run"]]
    for provider in _seen(rows, "provider"):
        mine = [row for row in rows if row["provider"] == provider]
        errors = [[row["error"] for row in mine if row["dtype"] == dtype and row["error"] is not None] for dtype in dtypes]
        problems = "; ".join(dict.fromkeys(row["problem"] for row in mine if row["problem"]))
        worst = [f"{max(found):.0e}" if found else "-" for found in errors]
        lines.append([provider, f"{sum(row['passed'] for row in mine)} of {len(mine)}", *worst, problems[:100]])
    return table(lines)


def peers_table(verdicts: list[Row]) -> str:
    """Our experts and the best of the others."""
    rows = [["experts of", "tokens", "us", "best of the others", "us", "allowed", ""]]
    for v in verdicts:
        eager = "" if v["best_peer_captured"] else " (eager)"
        said = "met" if v["met"] else "missed"
        ours, theirs = f"{v['us']:.1f}", f"{v['best_peer_us']:.1f}"
        rows.append([v["shape"], str(v["n_tokens"]), ours, v["best_peer"] + eager, theirs, f"{v['allowed']:.2f} x", said])
    return table(rows)


def decode_table(rows: list[Row]) -> str:
    """Offloaded decoding of one model and format."""
    arms = [row for row in rows if "arm" in row]
    if not arms:
        return "no arm came to its end"
    title = f"Offloaded decoding, {arms[0]['model']}, experts in {arms[0]['experts']}, generated weights and routing:"
    lines = [["arm", "over", "driven by", "slots", "tokens/s [lowest, highest]", "hits", "MB/token", "stall ms/token"]]
    for arm in arms:
        labels = [arm["arm"], arm["policy"], arm["driven_by"], str(arm["n_slots"])]
        if arm["tokens_per_s"] is None:
            lines.append([*labels, f"{NOT_MEASURED}: {arm['skipped']}", "", "", ""])
            continue
        rate = (
            f"{arm['tokens_per_s']:.1f} [{arm['lowest']:.1f}, {arm['highest']:.1f}]{'' if arm['agrees'] else ' OTHER LOGITS'}"
        )
        stall = NOT_MEASURED if arm["stall_s_per_token"] is None else f"{1e3 * arm['stall_s_per_token']:.2f}"
        lines.append([*labels, rate, f"{arm['hit_rate']:.0%}", f"{arm['moved_bytes_per_token'] / 1e6:.0f}", stall])
    return title + "\n\n" + table(lines)


def gains_table(verdicts: list[Row]) -> str:
    """What prefetching brings, and its bound."""
    rows = [["offloaded decoding", "driven by", "LRU / SLRU", "gate reuse / SLRU", "oracle / SLRU", "target", ""]]
    for v in verdicts:
        said = "met" if v["met"] else "missed" if v["oracle_allows_it"] else "missed; so does the oracle"
        ratios = [_ratio(v[key]) for key in ("lru_over_slru", "gate_reuse_over_slru", "oracle_over_slru")]
        rows.append([v["section"].removeprefix("decode "), v["driven_by"], *ratios, _ratio(v["target"]), said])
    return table(rows)


def transfers_table(rates: list[Row], verdict: Row | None) -> str:
    """GB/s by size and way, and the share of the best way at that size."""
    rows = [["experts of", "MB", "way", "GB/s", "of the best"]]
    for rate in rates:
        best = max(other["bytes_per_s"] for other in rates if other["shape"] == rate["shape"])
        gb, share = f"{rate['bytes_per_s'] / 1e9:.1f}", f"{rate['bytes_per_s'] / best:.0%}"
        rows.append([rate["shape"], f"{rate['row_bytes'] / 1e6:.2f}", rate["way"], gb, share])
    if verdict is None:
        return table(rows)
    said = f"{verdict['target'] / 1e9:.0f}: {'met' if verdict['met'] else 'missed'}"
    return table(rows) + f"\n\nCopy engine at best {verdict['bytes_per_s'] / 1e9:.1f} GB/s; target {said}."


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _seen(rows: list[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"
