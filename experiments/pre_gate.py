"""Write a copy of a checkpoint that ships pre-gates: trained heads as hints, or heads that route, fine-tuned.

    python -m experiments.pre_gate mode=hint level=1 output=outputs/bytes-moe-hint
    python -m experiments.pre_gate mode=route level=1 tune=heads output=outputs/bytes-moe-route

`route` is lossy: its quality on text that training never saw is measured beside the original's, both as written to disk. Leaves
the checkpoint (whole or not at all; the format is in `prefetch/pre_gate.py`) and `results.json`.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from experiments import launch
from experiments.atomic import new_folder, write_json
from experiments.config import ModelConfig, TrackingConfig, repository_path
from experiments.expert_store import refuse_quantised
from experiments.pre_gate_tuning import HEADS, TUNED, TuningOptions, tune
from experiments.progress import progress_bar
from experiments.provenance import provenance
from experiments.text_quality import BATCH, Window, relative_change, spread_windows, text_quality
from experiments.tracking import Tracker
from predictors.learned import OneHeadPerTarget
from predictors.pre_gate import PreGate, reused_gate
from prefetch.checkpoint import Checkpoint
from prefetch.errors import ConfigError
from prefetch.families import family_of, moe_geometry, moe_layer_indices
from prefetch.model import load_offloaded, load_whole, model_view, moe_blocks
from prefetch.pre_gate import HINT, MODES, ROUTE, PreGates, add_pre_gates, read_pre_gates
from prefetch.pre_gated_routing import route_by
from scripts.bundled_corpus import split_library

OF_THE_ORIGINAL = ("README.md", "training.json", "predictors")  # in a routed copy: what is no longer true of it
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass
class PreGateConfig:
    """Options of `python -m experiments.pre_gate`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    mode: str = ROUTE
    level: int = 1
    weights: str = MISSING
    tune: str = HEADS
    output: str | None = None
    n_threads: int = 2
    scored_bytes: int = 65536
    tuning: TuningOptions = field(default_factory=TuningOptions)


def main() -> None:
    ConfigStore.instance().store(name="pre_gate_schema", node=PreGateConfig)
    launch.run("pre_gate", pre_gate)


def pre_gate(cfg: DictConfig, folder: Path) -> None:
    """Write the checkpoint that `cfg` describes, and `results.json` into `folder`."""
    _check(cfg)
    refuse_quantised(cfg.model, "experiments.pre_gate")
    torch.set_num_threads(cfg.n_threads)
    source = repository_path(cfg.model.path)
    target = Path(cfg.output) if cfg.output else folder / "checkpoint"
    if target.exists():
        raise ConfigError(f"output={target} exists already: name a new folder, or remove that one")
    _check_source(Checkpoint(source), cfg.level)
    found = _hint(cfg, source, target) if cfg.mode == HINT else _route(cfg, source, target, folder)
    settings = {"mode": cfg.mode, "level": cfg.level, "lossless": cfg.mode == HINT, "checkpoint": target.name}
    record = {"config": OmegaConf.to_container(cfg, resolve=True), "provenance": provenance(cfg.tuning.seed)}
    write_json(folder / "results.json", settings | found | record)
    launch.say(f"checkpoint: {target}\nresults: {folder / 'results.json'}")


def _hint(cfg: DictConfig, source: Path, target: Path) -> dict[str, Any]:
    """A copy with the heads that experiments.train wrote; nothing else differs."""
    model = load_offloaded(source, getattr(torch, cfg.model.dtype))
    predictor = PreGate(cfg.level, str(repository_path(cfg.weights)))
    predictor.bind(model_view(model, family_of(model.config), moe_geometry(model.config, model.dtype)))
    network = predictor.network
    assert isinstance(network, OneHeadPerTarget)
    heads = tuple(network.get_parameter(f"heads.{target}.gate.weight") for target in predictor.targets())
    with new_folder(target) as aside:
        shutil.copytree(source, aside, dirs_exist_ok=True)
        add_pre_gates(aside, PreGates(cfg.level, HINT, _stored(heads)))
    return {"weights": cfg.weights}


def _route(cfg: DictConfig, source: Path, target: Path, folder: Path) -> dict[str, Any]:
    """Fine-tune with heads in the routers' place, write the model, and measure both models' quality."""
    options: TuningOptions = OmegaConf.to_object(cfg.tuning)  # type: ignore[assignment]
    _check_byte_level(source)
    training, held_out, shifted = split_library()
    torch.manual_seed(options.seed)
    model, own, heads = _with_heads(source, cfg.level)
    tracker = Tracker(cfg.tracking.mode, cfg.tracking.project)
    tracker.start(OmegaConf.to_container(cfg, resolve=True), folder)  # type: ignore[arg-type]
    started = time.perf_counter()
    with progress_bar(f"fine-tuning {cfg.tune}", options.steps) as advance:

        def report(figures: dict[str, float]) -> None:
            tracker.log(figures)
            advance()

        losses = tune(model, heads, cfg.tune, torch.from_numpy(training.tokens().astype("int64")), options, report)
    seconds = time.perf_counter() - started
    _write(model, own, heads, cfg, source, target)
    texts = {"held_out": held_out, "shifted": shifted}
    quality = {name: _compare(source, target, spread_windows(corpus, cfg.scored_bytes), name) for name, corpus in texts.items()}
    tracker.log({f"{name}/bits_per_byte_change": figures["bits_per_byte_change"] for name, figures in quality.items()})
    tracker.finish()
    Console().print(_table(quality))
    n_tuned = sum(head.numel() for head in heads) if cfg.tune == HEADS else sum(p.numel() for p in model.parameters())
    return {"quality": quality, "losses_nats": losses, "tuning_seconds": seconds, "parameters_tuned": n_tuned}


def _with_heads(source: Path, level: int) -> tuple[PreTrainedModel, list[Tensor], list[nn.Parameter]]:
    """(the model routed by heads that start as gate reuse, the routers' own weights [E, H] that they replaced, the heads)."""
    model = load_whole(source, torch.float32)
    family = family_of(model.config)
    view = model_view(model, family, moe_geometry(model.config, torch.float32))
    routers = [getattr(block, family.router) for block in moe_blocks(model, family)]
    own = [router.weight.detach().clone() for router in routers[level:]]
    starts = [reused_gate(view, target - level, target, torch.float32) for target in range(level, view.n_layers)]
    route_by(routers, PreGates(level, ROUTE, tuple(starts)))
    return model, own, [router.weight for router in routers[level:]]


@torch.no_grad()
def _write(
    model: PreTrainedModel, own: list[Tensor], heads: list[nn.Parameter], cfg: DictConfig, source: Path, target: Path
) -> None:
    """The checkpoint. Where heads alone were tuned, all other weights are the original's files."""
    stored = _stored(tuple(heads))
    with new_folder(target) as aside:
        left_out = (*OF_THE_ORIGINAL, *(WEIGHTS if cfg.tune != HEADS else ()))
        shutil.copytree(source, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out))
        if cfg.tune != HEADS:
            for head, weight in zip(heads, own, strict=True):
                head.copy_(weight)  # the file keeps the routers that heads stand in for, as every checkpoint has them
            model.config._experts_implementation = None
            model.to(torch.bfloat16).save_pretrained(aside)
        add_pre_gates(aside, PreGates(cfg.level, ROUTE, stored))


def _stored(heads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(head.detach().to(torch.bfloat16, copy=True) for head in heads)


def _compare(source: Path, target: Path, windows: list[Window], what: str) -> dict[str, Any]:
    """Both models' figures on one text, computed in float32 from the weights on disk."""
    found = []
    with progress_bar(f"quality, {what}", 2 * -(-len(windows) // BATCH)) as advance:
        for folder in (source, target):
            model = load_whole(folder, torch.float32)
            model.set_experts_implementation("eager")
            found.append(text_quality(model, windows, advance))
    before, after = found
    change, low, high = relative_change(before, after)
    return {
        "original": before.figures(),
        "pre_gated": after.figures(),
        "bits_per_byte_change": change,
        "bits_per_byte_change_95": [low, high],  # over windows
    }


def _check(cfg: DictConfig) -> None:
    if cfg.mode not in MODES:
        raise ConfigError(f"mode={cfg.mode}: choose one of {', '.join(MODES)}")
    if cfg.tune not in TUNED:
        raise ConfigError(f"tune={cfg.tune}: choose one of {', '.join(TUNED)}")
    for option in ("n_threads", "scored_bytes", "tuning.steps", "tuning.batch", "tuning.window"):
        if OmegaConf.select(cfg, option) < 1:
            raise ConfigError(f"{option}={OmegaConf.select(cfg, option)}: it must be at least 1")
    if not cfg.tuning.learning_rate > 0:
        raise ConfigError(f"tuning.learning_rate={cfg.tuning.learning_rate}: it must be above 0")


def _check_source(source: Checkpoint, level: int) -> None:
    n_layers = len(moe_layer_indices(source.config))
    if not 1 <= level < n_layers:
        raise ConfigError(f"level={level}: it must be from 1 to {n_layers - 1} layers for this model")
    if read_pre_gates(source) is not None:
        raise ConfigError(f"{source.folder} ships pre-gates already; begin with the checkpoint they were made from")


def _check_byte_level(source: Path) -> None:
    """Fine-tuning feeds bytes as token ids, so the model must read them so."""
    sample = bytes(range(32, 127))
    if AutoTokenizer.from_pretrained(source)(sample.decode())["input_ids"] != list(sample):  # without files: an empty tokenizer
        raise ConfigError(f"mode=route fine-tunes on bytes, and {source} has no tokenizer that maps bytes to themselves")


def _table(quality: dict[str, dict[str, Any]]) -> Table:
    table = Table("text", "model", "bits/byte", "loss, nats", "next-byte accuracy %", "change of bits/byte %", title="Quality")
    for name, figures in quality.items():
        for model in ("original", "pre_gated"):
            found = figures[model]
            label, change = ("original", "") if model == "original" else ("pre-gated, lossy", _change(figures))
            numbers = f"{found['bits_per_byte']:.4f}", f"{found['loss_nats']:.4f}", f"{100 * found['next_byte_accuracy']:.2f}"
            table.add_row(f"{name}, {found['bytes_scored']} bytes", label, *numbers, change)
    return table


def _change(figures: dict[str, Any]) -> str:
    low, high = figures["bits_per_byte_change_95"]
    return f"{100 * figures['bits_per_byte_change']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


if __name__ == "__main__":
    main()
