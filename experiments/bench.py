"""Measure what the project promises, on this machine, and write one JSON with conditions: `make bench`.

    python -m experiments.bench

Exactness against unmodified transformers, speed with everything resident, today's alternative (accelerate's disk offload),
transfers against the disk's own rate, and the runtime's overhead per layer call. The comparison of predictors is
`experiments.decode`; its figures at 25 % and 45 % slots are `make results`.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import dispatch_model
from omegaconf import DictConfig
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel

from experiments import launch
from experiments.arm import run_arm, runtime
from experiments.atomic import write_json
from experiments.backend import build_source, refuse_gpu
from experiments.bench_tables import rich_bench
from experiments.config import repository_path
from experiments.decode import decode_arms
from experiments.expert_store import refuse_quantised
from experiments.generation import divergences, generate
from experiments.link_rate import measured_bytes_per_s
from experiments.progress import with_progress
from experiments.provenance import provenance
from experiments.workload import Batch, load_batches
from prefetch.accounting import summarise
from prefetch.geometry import ExpertKey
from prefetch.model import attach, load_offloaded, load_whole
from prefetch.slots import SlotPool
from prefetch.store import ExpertStore
from prefetch.transfers.threads import ThreadTransfers

REPEATS = 7
OVERLAP_REPEATS = 5
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")  # transformers' own, of which the fastest counts


def main() -> None:
    launch.run("bench", bench)


def bench(cfg: DictConfig, folder: Path) -> None:
    """All parts, each announced; writes `bench.json` to `folder` and shows its figures beside their targets."""
    refuse_quantised(cfg.model, "experiments.bench")
    refuse_gpu(cfg.backend, "experiments.bench")
    torch.set_num_threads(cfg.backend.n_threads)
    model_folder = repository_path(cfg.model.path)
    arms = decode_arms(cfg)
    batches = load_batches(
        model_folder,
        prompts=repository_path(cfg.workload.prompts),
        text=None,
        n_prompts=cfg.workload.n_prompts,
        batch_size=1,
        max_prompt_tokens=cfg.workload.max_prompt_tokens,
    )
    parts: dict[str, Callable[[], Any]] = {
        "exactness_float32": lambda: exactness(
            model_folder, torch.float32, arms["gate_reuse"], batches, cfg.workload.new_tokens
        ),
        "exactness_bfloat16": lambda: exactness(
            model_folder, torch.bfloat16, arms["gate_reuse"], batches, cfg.workload.new_tokens
        ),
        "resident_speed": lambda: resident_speed(model_folder, arms["resident"], batches[0]),
        "accelerate_disk_offload": lambda: against_accelerate(model_folder, arms["gate_reuse"], batches[0]),
        "transfers": lambda: transfer_rate(arms["gate_reuse"], _store(model_folder, torch.float32, cfg)),
        "overlap": lambda: overlap(model_folder, arms["oracle"], arms["resident"], batches[:4]),
        "overhead": lambda: overhead(model_folder, arms["resident"], batches[0]),
    }
    found: dict[str, Any] = {"provenance": provenance(cfg.seed, _store(model_folder, torch.float32, cfg).path)}
    for position, (name, part) in enumerate(parts.items(), start=1):
        launch.say(f"{position} of {len(parts)}: {name}")
        found[name] = part()
    write_json(folder / "bench.json", found)
    Console().print(rich_bench(found))
    launch.say(f"results: {folder / 'bench.json'}")


def exactness(folder: Path, dtype: torch.dtype, arm: DictConfig, batches: list[Batch], new_tokens: int) -> dict[str, Any]:
    """Greedy tokens of an offloaded run against the unmodified model; where they part, how close the two best logits were."""
    reference_model = _plain(folder, dtype, "eager")
    reference = [generate(reference_model, batch.token_ids, new_tokens) for batch in with_progress("unmodified model", batches)]
    store = _store(folder, dtype, arm)
    model = load_offloaded(folder, dtype)
    with runtime(arm, store, None) as served, attach(model, served):
        ours = [generate(model, batch.token_ids, new_tokens) for batch in with_progress("offloaded", batches)]
    parted = divergences(reference, ours, torch.finfo(dtype).eps)
    return {
        "tokens_compared": sum(g.tokens.numel() for g in reference),
        "sequences": sum(len(g.tokens) for g in reference),
        "sequences_that_diverge": len(parted),
        "largest_margin_at_a_divergence": max((d.margin for d in parted), default=0.0),
        "divergences_beyond_rounding": sum(d.margin > d.rounding for d in parted),
        "divergences": [vars(d) for d in parted],
    }


def resident_speed(folder: Path, arm: DictConfig, batch: Batch) -> dict[str, Any]:
    """Time per output token with every expert in a slot, beside transformers' own implementations, interleaved."""
    model, store = load_offloaded(folder, torch.float32), _store(folder, torch.float32, arm)
    plain = {name: _plain(folder, torch.float32, name) for name in IMPLEMENTATIONS}
    with runtime(arm, store, None) as served, attach(model, served):
        candidates = {"gatecast": model, **plain}
        tpot_s = _interleaved(candidates, batch)
    fastest = min(IMPLEMENTATIONS, key=lambda name: statistics.median(tpot_s[name]))
    ratios = [ours / theirs for ours, theirs in zip(tpot_s["gatecast"], tpot_s[fastest], strict=True)]
    return {"tpot_s": tpot_s, "fastest_of_transformers": fastest, "ratio_median": statistics.median(ratios), "ratios": ratios}


def against_accelerate(folder: Path, arm: DictConfig, batch: Batch) -> dict[str, Any]:
    """What a user would do today: the same model with its experts offloaded to disk by accelerate, interleaved with ours.

    accelerate maps its files, so that in a model this small they stay in the page cache and it reads RAM, not a disk. A model
    that needs offloading does not fit there: the second measurement has the system drop the files' pages before every token.
    gatecast reads past the page cache in both.
    """
    model, store = load_offloaded(folder, torch.float32), _store(folder, torch.float32, arm)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=store.path.parent) as offload_folder, runtime(arm, store, None) as served:
        theirs = _offloaded_by_accelerate(folder, offload_folder)
        files = list(Path(offload_folder).glob("*.dat"))
        with attach(model, served):
            for name, before_step in (("page_cache", None), ("from_disk", partial(_drop_pages, files))):
                tpot_s = _interleaved({"gatecast": model, "accelerate": theirs}, batch, 3, 24, {"accelerate": before_step})
                ratios = [slow / ours for ours, slow in zip(tpot_s["gatecast"], tpot_s["accelerate"], strict=True)]
                found[name] = {"tpot_s": tpot_s, "speed_up_median": statistics.median(ratios), "speed_ups": ratios}
    return found


def _drop_pages(files: list[Path]) -> None:
    """Let the page cache forget these files, which must have been written back."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def transfer_rate(arm: DictConfig, store: ExpertStore) -> dict[str, Any]:
    """Bytes/s of queued prefetches against bare reads of the same sizes by as many threads, interleaved."""
    n_slots = 64
    pool = SlotPool(store.geometry, n_slots)
    bare, queued = [], []
    source = build_source(arm, store)
    transfers = ThreadTransfers(source, pool.buffer, n_threads=arm.tier.n_threads, chunk_bytes=arm.tier.chunk_bytes)
    keys = [ExpertKey(*divmod(i * 37 % store.geometry.n_total, store.geometry.n_experts)) for i in range(256)]
    try:
        for _ in with_progress("transfers", range(REPEATS)):
            bare.append(measured_bytes_per_s(source, store.geometry, arm.tier.n_threads))
            started = time.perf_counter()
            _move_all(transfers, keys, n_slots)
            queued.append(len(keys) * store.row_bytes / (time.perf_counter() - started))
    finally:
        transfers.close()
        source.close()
    shares = [q / b for q, b in zip(queued, bare, strict=True)]
    return {
        "bare_bytes_per_s": bare,
        "transfers_bytes_per_s": queued,
        "share_median": statistics.median(shares),
        "shares": shares,
    }


def _move_all(transfers: ThreadTransfers, keys: list[ExpertKey], n_slots: int) -> None:
    """Every slot is given its next expert as soon as one has arrived in it."""
    coming = iter(keys)
    moving = [transfers.submit(key, slot, demand=False) for slot, key in zip(range(n_slots), coming, strict=False)]
    while moving:
        settled = transfers.wait_any(moving)
        moving = [transfer for transfer in moving if transfer not in settled]
        moving += [transfers.submit(key, t.slot, demand=False) for t, key in zip(settled, coming, strict=False)]


def overlap(folder: Path, oracle: DictConfig, resident: DictConfig, batches: list[Batch]) -> dict[str, Any]:
    """How much of the transfers a perfect predictor hides: decode time against the longer of computing and moving.

    Computing is measured in two ways: in the same run, as all but its stall; and with everything resident, which is stricter:
    there nothing is predicted, and no transfer disturbs the processor.
    """
    model, store = load_offloaded(folder, torch.float32), _store(folder, torch.float32, oracle)
    first = run_arm(resident, model, store, batches, None, {})
    rows = []
    for _ in with_progress("overlap", range(OVERLAP_REPEATS)):
        alone = summarise(run_arm(resident, model, store, batches, None, {}).record)
        found = summarise(run_arm(oracle, model, store, batches, first.trace, {}).record)
        wall_s, alone_s = (part["wall_s"] / part["n_tokens"] for part in (found, alone))
        moving_s, own_s = wall_s * found["transfer_share"], wall_s * (1 - found["stall_share"])
        row = {"oracle_s": wall_s, "resident_s": alone_s, "moving_s": moving_s, "own_compute_s": own_s}
        rows.append(row | {"to_own": wall_s / max(own_s, moving_s), "to_resident": wall_s / max(alone_s, moving_s)})
    return {"per_token": rows} | {
        f"{name}_median": statistics.median(r[name] for r in rows) for name in ("to_own", "to_resident")
    }


def overhead(folder: Path, arm: DictConfig, batch: Batch) -> dict[str, Any]:
    """Microseconds per decode layer call that are not expert arithmetic (no miss, no predictor), and where they go."""
    model, store = load_offloaded(folder, torch.float32), _store(folder, torch.float32, arm)
    with runtime(arm, store, None) as served, attach(model, served):
        generate(model, batch.token_ids, 96)
        generate(model, batch.token_ids, 96)
        served.finish()
        calls = served.record().calls
        quiet = calls[(calls["phase"] == "decode") & (calls["misses"] == 0) & (calls["sequence"] == 1)]
        profile = cProfile.Profile()
        profile.runcall(generate, model, batch.token_ids, 96)
    rows = [
        {"function": f"{Path(file).name}:{name}", "calls": n_calls, "self_us_per_call": own_s / n_calls * 1e6}
        for (file, _, name), (_, n_calls, own_s, _, _) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
        if any(part in file for part in ("/prefetch/", "/kernels/"))
    ]
    return {
        "overhead_us_median": float(quiet["overhead_s"].median() * 1e6),
        "expert_us_median": float(quiet["expert_s"].median() * 1e6),
        "layer_call_us_median": float(quiet["total_s"].median() * 1e6),
        "profile_self_time": sorted(rows, key=lambda row: -row["self_us_per_call"] * row["calls"])[:10],
    }


def _interleaved(
    models: dict[str, PreTrainedModel],
    batch: Batch,
    repeats: int = REPEATS,
    new_tokens: int = 64,
    before_step: Mapping[str, Callable[[], None] | None] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Median seconds per decode step of each model, once per repeat, the models taking turns; `before_step` is not timed."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for repeat in with_progress(", ".join(models), range(-1, repeats)):  # the first turn warms up
        for name, model in models.items():
            tpot_s = statistics.median(_decode_steps_s(model, batch, new_tokens, before_step.get(name)))
            if repeat >= 0:
                found[name].append(tpot_s)
    return found


@torch.inference_mode()
def _decode_steps_s(
    model: PreTrainedModel, batch: Batch, new_tokens: int, before_step: Callable[[], None] | None
) -> list[float]:
    cache, token_ids, steps_s = DynamicCache(config=model.config), batch.token_ids, []
    for _ in range(new_tokens):
        if before_step is not None:
            before_step()
        started = time.perf_counter()
        logits = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token_ids = logits[:, -1].argmax(-1, keepdim=True)
        steps_s.append(time.perf_counter() - started)
    return steps_s[1:]


def _plain(folder: Path, dtype: torch.dtype, implementation: str) -> PreTrainedModel:
    model = load_whole(folder, dtype)
    model.set_experts_implementation(implementation)
    return model


def _offloaded_by_accelerate(folder: Path, offload_folder: str) -> PreTrainedModel:
    model = _plain(folder, torch.float32, "eager")
    experts = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    rest = [
        name
        for name, module in model.named_modules()
        if not list(module.children()) and not any(name.startswith(e) for e in experts)
    ]
    device_map = (
        dict.fromkeys(rest, "cpu")
        | dict.fromkeys(experts, "disk")
        | {name.rsplit(".", 1)[0] + ".gate": "cpu" for name in experts}
    )
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=offload_folder)


def _store(folder: Path, dtype: torch.dtype, cfg: DictConfig) -> ExpertStore:
    return ExpertStore.open(folder, dtype, repository_path(cfg.model.pack_dir))


if __name__ == "__main__":
    main()
