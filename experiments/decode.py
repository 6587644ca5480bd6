"""Decode a workload with offloaded experts and compare arms in one interleaved run: the main experiment.

    python -m experiments.decode experiment=demo
    python -m experiments.decode predictor=gate_reuse cache.slots=0.45
    python -m experiments.decode --help

Every arm decodes the same prompts and draws its tokens with the same noise; repeats are interleaved, so that the machine's drift
hits all alike. Arms must agree to the last bit, and with the unmodified model in every token, before any number is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments import launch
from experiments.after_warmup import counted_calls, record_after, trace_after
from experiments.arm import ArmRun, run_arm
from experiments.arm_parts import check_books, leaves_in_place
from experiments.arms import compose_arms, roles, rotated
from experiments.backend import BackingTiers, enforce_budget, memory_budget, use_device
from experiments.config import repository_path, validate
from experiments.expert_store import open_store, quant_format
from experiments.generation import Generation, divergences, generate_all, same_bits
from experiments.link_rate import measured_bytes_per_s
from experiments.progress import progress_bar
from experiments.provenance import provenance
from experiments.results import BASELINE, BELADY, ArmResult, Quality, Results
from experiments.run_folder import write_folder
from experiments.shipped_predictor import announcement, default_predictor, shipped_pre_gates
from experiments.slot_budget import check_slots, slot_budget
from experiments.workload import Batch, load_batches
from prefetch.accounting import is_preload, summarise
from prefetch.cache.belady import belady_hits
from prefetch.errors import CapacityError, ConfigError, TokenMismatchError
from prefetch.geometry import ExpertKey
from prefetch.model import load_offloaded, load_whole
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
    cfgs = decode_arms(cfg)
    arms = {name: Measured(cfgs[name], role) for name, role in roles(cfgs).items()}
    torch.manual_seed(cfg.seed)
    device = use_device(cfg.backend)
    model_folder, dtype = repository_path(cfg.model.path), getattr(torch, cfg.model.dtype)
    store = open_store(cfg.model)
    budget_bytes = memory_budget(cfg.backend, device)
    check_slots(cfgs, store.geometry, budget_bytes)  # what cannot run is known before anything does
    batches = workload_batches(cfg, model_folder)
    reference = _reference(cfg, model_folder, dtype, device, batches) if cfg.check_tokens else None
    if budget_bytes is not None:
        enforce_budget(device, budget_bytes)
    model = load_offloaded(model_folder, dtype, device)
    if budget_bytes is not None:
        check_slots(cfgs, store.geometry, budget_bytes - torch.cuda.memory_allocated(device))
    metadata = {"model": model_folder.name, "fingerprint": store.fingerprint, "workload": str(OmegaConf.to_yaml(cfg.workload))}
    n_threads = max(arm_cfg.tier.n_threads for arm_cfg in cfgs.values())
    with BackingTiers(store, n_threads) as tiers, progress_bar("decoding", 1 + cfg.repeats * len(arms)) as advance:
        link_bytes_per_s = _link_rate(cfg, store, tiers, device)

        def run(name: str, recording: RoutingTrace | None) -> ArmRun:
            arm_cfg = arms[name].cfg
            found = run_arm(arm_cfg, model, store, batches, recording, metadata, tiers.of(arm_cfg))
            _check(name, found, reference, arms, torch.finfo(dtype).eps)
            advance()
            return found

        recording = run(_recording_arm(arms), None).trace  # warms up and records what oracles read; it is not measured
        for repeat in range(cfg.repeats):
            for name in rotated(list(arms), repeat):
                arm = arms[name]
                arm.last = run(name, recording)
                measured = record_after(arm.last.record, cfg.workload.warmup_batches)
                arm.repeats.append(summarise(measured, link_bytes_per_s))
    rerouted = model.pre_gates is not None and model.pre_gates.route
    results = _results(cfg, arms, store, link_bytes_per_s, lossless=reference is not None and not rerouted)
    runs = {name: arm.last for name, arm in arms.items() if arm.last is not None}
    write_folder(
        results,
        runs,
        folder,
        cfg.tracking,
        n_warmup=cfg.workload.warmup_batches,
        timeline_forwards=cfg.timeline_forwards,
    )


def decode_arms(cfg: DictConfig) -> dict[str, DictConfig]:
    """Every arm's full configuration; a model's own pre-gates are the predictor of an arm that names none."""
    pre_gates = shipped_pre_gates(repository_path(cfg.model.path))
    if pre_gates is not None:
        console.print(announcement(pre_gates))

    def check(arm_cfg: DictConfig) -> None:
        validate(arm_cfg)
        if arm_cfg.backend.kind != cfg.backend.kind:
            raise ConfigError(
                f"backend={arm_cfg.backend.kind}: all arms share one model and so one backend ({cfg.backend.kind})"
            )
        if arm_cfg.backend.router != cfg.backend.router:
            raise ConfigError(f"backend.router={arm_cfg.backend.router}: all arms are routed alike ({cfg.backend.router})")
        if arm_cfg.model != cfg.model:
            raise ConfigError("every arm runs the same model; give model options to the whole run")

    return compose_arms(cfg, check, lambda given: default_predictor(pre_gates, given))


def _recording_arm(arms: dict[str, Measured]) -> str:
    """An arm that needs no recording itself."""
    for name, arm in arms.items():
        if not arm.cfg.predictor._target_.endswith(".Oracle"):
            return name
    raise ConfigError("every arm is an oracle, and none can record what oracles read: add an arm without, e.g. predictor=none")


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
    check_books(name, run.record)
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


def _results(
    cfg: DictConfig, arms: dict[str, Measured], store: ExpertStore, link_bytes_per_s: float, *, lossless: bool
) -> Results:
    how = quant_format(cfg.model)
    any_run = next(arm.last for arm in arms.values() if arm.last is not None)
    baseline = next((arm for arm in arms.values() if arm.role == BASELINE), None)
    budget = slot_budget(baseline.cfg if baseline else cfg, store.geometry)
    trace = any_run.trace
    n_warmup = cfg.workload.warmup_batches
    preloaded = _preloaded(baseline.last) if baseline and baseline.last else []
    belady = belady_hits(trace.routing_events(), budget.capacity, counted_calls(trace, n_warmup), preloaded)
    found = provenance(cfg.seed, store.path) | {"link_bytes_per_s": link_bytes_per_s}
    return Results(
        config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
        provenance=found,
        arms={
            name: ArmResult(
                arm.role,
                arm.repeats,
                None if arm.last is None else Quality.of(trace_after(arm.last.trace, n_warmup)),
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


if __name__ == "__main__":
    main()
