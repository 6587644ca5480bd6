"""Decode a workload with offloaded experts and compare arms in one interleaved run: the main experiment.

    python -m experiments.decode experiment=demo
    python -m experiments.decode predictor=gate_reuse cache.slots=0.45
    python -m experiments.decode --help

Every arm decodes the same prompts greedily; repeats are interleaved, so that the machine's drift hits all alike. Arms must
agree to the last bit, and with the unmodified model in every token, before any number is written.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments import launch, plots, tables
from experiments.arm import ArmRun, leaves_in_place, run_arm
from experiments.atomic import write_text
from experiments.backend import BackingTiers, enforce_budget, memory_budget, use_device
from experiments.config import CACHE_COMMON, repository_path, validate
from experiments.expert_store import open_store, quant_format
from experiments.generation import Generation, divergences, generate_all, same_bits
from experiments.link_rate import measured_bytes_per_s
from experiments.progress import progress_bar
from experiments.provenance import provenance
from experiments.results import BASELINE, BELADY, BOUND, PREDICTOR, ArmResult, Quality, Results
from experiments.shipped_predictor import announcement, default_predictor, shipped_pre_gates
from experiments.slot_budget import check_slots, slot_budget
from experiments.timeline import write_timeline
from experiments.tracking import Tracker
from experiments.workload import Batch, load_batches
from prefetch.accounting import is_preload, summarise, violations
from prefetch.cache.belady import belady_hits
from prefetch.errors import CapacityError, ConfigError, GatecastError, TokenMismatchError
from prefetch.geometry import ExpertKey
from prefetch.model import load_offloaded, load_whole
from prefetch.recorder import RunRecord
from prefetch.store import ExpertStore
from prefetch.trace import RoutingTrace

console = Console(stderr=True)


@dataclass
class Measured:
    """One arm's repeats. Of the last repeat everything is kept, of the others the figures."""

    cfg: DictConfig
    role: str
    repeats: list[dict[str, float]] = field(default_factory=list)
    last: ArmRun | None = None


def main() -> None:
    launch.run("decode", decode)


def decode(cfg: DictConfig, folder: Path) -> None:
    """Run all arms of `cfg` and write results, tables, plots, timelines and routing traces to `folder`."""
    arms = compose_arms(cfg)
    torch.manual_seed(cfg.seed)
    device = use_device(cfg.backend)
    model_folder, dtype = repository_path(cfg.model.path), getattr(torch, cfg.model.dtype)
    store = open_store(cfg.model)
    budget_bytes = memory_budget(cfg.backend, device)
    cfgs = {name: arm.cfg for name, arm in arms.items()}
    check_slots(cfgs, store.geometry, budget_bytes)  # what cannot run is known before anything does
    batches = workload_batches(cfg, model_folder)
    reference = _reference(cfg, model_folder, dtype, device, batches) if cfg.check_tokens else None
    if budget_bytes is not None:
        enforce_budget(device, budget_bytes)
    model = load_offloaded(model_folder, dtype, device)
    if budget_bytes is not None:
        check_slots(cfgs, store.geometry, budget_bytes - torch.cuda.memory_allocated(device))
    metadata = {"model": model_folder.name, "fingerprint": store.fingerprint, "workload": str(OmegaConf.to_yaml(cfg.workload))}
    recording: RoutingTrace | None = None
    n_threads = max(arm_cfg.tier.n_threads for arm_cfg in cfgs.values())
    with BackingTiers(store, n_threads) as tiers, progress_bar("decoding", (cfg.repeats + 1) * len(arms)) as advance:
        link_bytes_per_s = _link_rate(cfg, store, tiers, device)
        for repeat in range(-1, cfg.repeats):  # the first pass warms up and records what oracles read; it is not measured
            for name in _rotated(list(arms), repeat):
                arm = arms[name]
                if repeat < 0 and recording is not None:
                    advance()
                    continue
                source_arm = arms[_recording_arm(arms)] if repeat < 0 else arm
                run = run_arm(source_arm.cfg, model, store, batches, recording, metadata, tiers.of(source_arm.cfg))
                _check(name, run, reference, arms, torch.finfo(dtype).eps)
                if repeat < 0:
                    recording = run.trace
                else:
                    measured = after_warmup(run.record, cfg.workload.warmup_batches)
                    arm.repeats.append(summarise(measured, link_bytes_per_s))
                    arm.last = run
                advance()
    rerouted = model.pre_gates is not None and model.pre_gates.route
    results = _results(cfg, arms, store, link_bytes_per_s, lossless=reference is not None and not rerouted)
    _write(cfg, results, arms, folder)


def compose_arms(cfg: DictConfig) -> dict[str, Measured]:
    """Every arm's full configuration: the command line's, with the arm's own overrides on top.

    Where an arm chooses another file of a group, the command line's knobs of that group do not apply to it, but for those
    that all caches share.
    """
    hydra_cfg = HydraConfig.get()
    given = [override for override in hydra_cfg.overrides.task if not override.lstrip("+~").startswith("arms.")]
    named = {name: overrides for name, overrides in cfg.arms.items() if overrides is not None}
    if not named:
        raise ConfigError("no arm is left: name at least one, e.g. \"+arms.mine=['predictor=gate_reuse']\"")
    pre_gates = shipped_pre_gates(repository_path(cfg.model.path))
    if pre_gates is not None:
        console.print(announcement(pre_gates))
    arms: dict[str, Measured] = {}
    for name, overrides in named.items():
        chosen = {override.split("=")[0] for override in overrides}
        kept = [override for override in given if _applies(override, chosen)]
        own = [*kept, *overrides]
        arm_cfg = compose(hydra_cfg.job.config_name, overrides=[*own, *default_predictor(pre_gates, own)])
        try:
            validate(arm_cfg)
            if arm_cfg.backend.kind != cfg.backend.kind:
                raise ConfigError(
                    f"backend={arm_cfg.backend.kind}: all arms share one model and so one backend ({cfg.backend.kind})"
                )
        except ConfigError as error:
            raise ConfigError(f"arm {name}: {error}") from error
        if arm_cfg.model != cfg.model:
            raise ConfigError(f"arm {name}: every arm runs the same model; give model options to the whole run")
        arms[name] = Measured(arm_cfg, _role(arm_cfg, BASELINE in (arm.role for arm in arms.values())))
    return arms


def _applies(override: str, chosen_groups: set[str]) -> bool:
    key = override.lstrip("+~").split("=")[0]
    group, _, knob = key.partition(".")
    return group not in chosen_groups or (group == "cache" and knob in CACHE_COMMON and knob != "prefetch_admission")


def _role(cfg: DictConfig, has_baseline: bool) -> str:
    classes = {cfg.cache._target_.rsplit(".", 1)[1], cfg.predictor._target_.rsplit(".", 1)[1]}
    if classes & {"Oracle", "Resident", "NoCache"}:
        return BOUND
    if "NoPredictor" in classes and not has_baseline:
        return BASELINE
    return PREDICTOR


def _recording_arm(arms: dict[str, Measured]) -> str:
    """An arm that needs no recording itself."""
    for name, arm in arms.items():
        if not arm.cfg.predictor._target_.endswith(".Oracle"):
            return name
    raise ConfigError("every arm is an oracle, and none can record what oracles read: add an arm without, e.g. predictor=none")


def _rotated(names: list[str], repeat: int) -> list[str]:
    """Each repeat begins with another arm, so that none always follows the same neighbour's mess."""
    shift = repeat % len(names)
    return names[shift:] + names[:shift]


def workload_batches(cfg: DictConfig, model_folder: Path) -> list[Batch]:
    """The batches that `cfg.workload` describes."""
    workload = cfg.workload
    return load_batches(
        model_folder,
        prompts=repository_path(workload.prompts) if workload.prompts else None,
        text=Path(workload.text) if workload.text else None,
        n_prompts=workload.n_prompts,
        batch_size=workload.batch_size,
        max_prompt_tokens=workload.max_prompt_tokens,
    )


def _reference(
    cfg: DictConfig, model_folder: Path, dtype: torch.dtype, device: torch.device, batches: list[Batch]
) -> list[Generation]:
    """What the unmodified model says, as transformers runs it; where experts are quantised, with what their codes stand for."""
    try:
        model = load_whole(model_folder, dtype, device, quant_format(cfg.model))
        with progress_bar("unmodified model", len(batches)) as advance:
            generations = []
            for generation in generate_all(model, batches, cfg.workload, cfg.seed):
                generations.append(generation)
                advance()
        return generations
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{device} cannot hold the unmodified model, which tokens are compared with: check_tokens=false does without"
        ) from error


def _link_rate(cfg: DictConfig, store: ExpertStore, tiers: BackingTiers, device: torch.device) -> float:
    """Bytes/s that `link_utilisation` is a share of: the emulated link's, or the backing tier's own, measured now."""
    if cfg.tier.link is not None:
        return float(cfg.tier.link.bytes_per_s)
    return measured_bytes_per_s(tiers.of(cfg), store.geometry, cfg.tier.n_threads, device)


def _check(name: str, run: ArmRun, reference: list[Generation] | None, arms: dict[str, Measured], epsilon: float) -> None:
    """Refuse a run that is wrong: its books, its bits against other arms, its tokens against the unmodified model."""
    broken = violations(run.record)
    if broken:
        raise GatecastError(f"arm {name}: the run's books do not balance: {'; '.join(broken)}")
    for other_name, other in arms.items():
        drivers = {arms[name].cfg.backend.driven_by, other.cfg.backend.driven_by}
        if len(drivers) > 1 or _rounds_apart(arms[name].cfg) or _rounds_apart(other.cfg):
            continue
        if other.last is not None and not same_bits(run.generations, other.last.generations):
            raise TokenMismatchError(
                f"arm {name} computed other logits than arm {other_name}: a lossless arm must not; please report it"
            )
    if reference is None:
        return
    wrong = [d for d in divergences(reference, run.generations, epsilon) if d.margin > d.rounding]
    if wrong:
        raise TokenMismatchError(
            f"arm {name} generated another token than the unmodified model at batch {wrong[0].batch}, step {wrong[0].step}, where the "
            f"two best logits differ by {wrong[0].margin:.3g}, more than rounding explains ({wrong[0].rounding:.3g})"
        )


def _rounds_apart(cfg: DictConfig) -> bool:
    """Some experts are computed by the CPU and others by a GPU, whose sums round differently: equal up to rounding only."""
    return cfg.backend.kind == "cuda" and cfg.backend.in_place == "cpu" and leaves_in_place(cfg)


def after_warmup(record: RunRecord, n_batches: int) -> RunRecord:
    """The rows of `record` from the `n_batches`-th batch on, and the preloads, which belong to the whole run."""
    calls, forwards = (table[table["sequence"] >= n_batches] for table in (record.calls, record.forwards))
    transfers = record.transfers
    return RunRecord(calls, forwards, transfers[(transfers["sequence"] >= n_batches) | is_preload(transfers)])


def _results(
    cfg: DictConfig, arms: dict[str, Measured], store: ExpertStore, link_bytes_per_s: float, *, lossless: bool
) -> Results:
    how = quant_format(cfg.model)
    any_run = next(arm.last for arm in arms.values() if arm.last is not None)
    baseline = next((arm for arm in arms.values() if arm.role == BASELINE), None)
    budget = slot_budget(baseline.cfg if baseline else cfg, store.geometry)
    trace = any_run.trace
    counted = [
        f.step > 0 and f.sequence >= cfg.workload.warmup_batches for f in trace.forwards() for _ in range(trace.n_layers)
    ]
    preloaded = _preloaded(baseline.last) if baseline and baseline.last else []
    belady = belady_hits(trace.routing_events(), budget.capacity, counted, preloaded)
    found = provenance(cfg.seed, store.path) | {"link_bytes_per_s": link_bytes_per_s}
    return Results(
        config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
        provenance=found,
        arms={
            name: ArmResult(
                arm.role,
                arm.repeats,
                _quality(arm.last, cfg.workload.warmup_batches),
                lossless=lossless,
                emulated=arm.cfg.tier.link is not None,
            )
            for name, arm in arms.items()
        },
        bounds={BELADY: belady.hit_rate},
        slots=budget.n_slots,
        slots_fraction=budget.n_slots / store.geometry.n_total,
        quantised=None if how is None else str(how),
        peak_rss_bytes=max(arm.last.peak_rss_bytes for arm in arms.values() if arm.last is not None),
    )


def _preloaded(run: ArmRun) -> list[ExpertKey]:
    """What the run's cache held before its first token."""
    transfers = run.record.transfers
    return [ExpertKey(*key) for key in transfers.loc[is_preload(transfers), ["layer", "expert"]].to_numpy().tolist()]


def _quality(run: ArmRun | None, warmup: int) -> Quality | None:
    if run is None:
        return None
    trace = run.trace
    kept = trace.sequence >= warmup
    arrays = {f.name: getattr(trace, f.name)[kept] for f in dataclasses.fields(trace) if f.name in _ROW_ARRAYS}
    guesses, resident = ({d: a[kept] for d, a in group.items()} for group in (trace.guesses, trace.resident))
    return Quality.of(dataclasses.replace(trace, **arrays, guesses=guesses, resident=resident))


_ROW_ARRAYS = {"sequence", "step", "phase", "token_ids", "topk_ids", "topk_weights"}


def _write(cfg: DictConfig, results: Results, arms: dict[str, Measured], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(cfg.tracking.mode, cfg.tracking.project)
    tracker.start(results.config, folder)
    for name, arm in arms.items():
        if arm.last is None:
            continue
        first = len(arm.last.record.forwards[arm.last.record.forwards["sequence"] < cfg.workload.warmup_batches])
        write_timeline(arm.last.record, folder / f"timeline_{name}.json", first, cfg.timeline_forwards)
        if arm.last.trace.guesses or arm.role == BASELINE:
            arm.last.trace.save(folder / f"trace_{name}.safetensors")
        write_text(folder / f"calls_{name}.csv", arm.last.record.calls.to_csv(index=False))
        write_text(folder / f"transfers_{name}.csv", arm.last.record.transfers.to_csv(index=False))
    tables.write_comparison(results, folder)
    images = [folder / "time_breakdown.png", folder / "recall_per_layer.png", folder / "tokens_per_s.png"]
    plots.time_breakdown(results, images[0])
    plots.recall_per_layer(results, images[1])
    plots.tokens_per_s_vs_slots([results], images[2])
    _track(tracker, results, images)
    results.save(folder)  # last: a folder with results.json is complete
    Console().print(tables.rich_comparison(results))
    for name, arm in arms.items():
        if arm.last is not None and arm.last.predictor_failed:
            console.print(
                f"warning: the predictor of arm {name} failed and was switched off; its figures are those without prefetch"
            )
    console.print(f"results: {folder}")


def _track(tracker: Tracker, results: Results, images: list[Path]) -> None:
    table = tables.comparison(results)
    metrics = {
        f"{row['arm']}/{column}": row[column]
        for row in table.to_dict("records")
        for column in ("tokens_per_s", "ratio", "hit_rate", "recall", "stall_share")
        if pd.notna(row.get(column))
    }
    tracker.log(metrics)
    tracker.log_table("comparison", table)
    for image in images:
        if image.exists():
            tracker.log_image(image.stem, image)
    tracker.finish()


if __name__ == "__main__":
    main()
