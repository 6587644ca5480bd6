"""What may be configured, with types; and what a configuration must not combine.

`cache`, `predictor`, `planner` and `format` are plug-ins: their knobs are the arguments of the class that `_target_` names, here or in
anybody's code, and are checked against its signature.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import hydra.errors
from hydra.core.config_store import ConfigStore
from hydra.utils import get_class, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from kernels.quantised import GROUPS
from prefetch.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
# Keys of `cache` that are not the policy's.
CACHE_COMMON = ("slots", "staging", "transient", "scope", "prefetch_admission", "preload", "hot_experts")
LONGEST_NAME = 200  # bytes of a folder's name
PLAIN_TYPES = (bool, int, float, str, type(None))
PLAIN = "plain"  # the expert_format of experts that are not quantised
CHOICES = {
    "model.dtype": ("float32", "float16", "bfloat16"),
    "model.expert_format": (PLAIN, *GROUPS),
    "tier.kind": ("disk", "host"),
    "cache.scope": ("global", "per_layer"),
    "cache.prefetch_admission": ("staging", "policy"),
    "cache.preload": ("none", "hot_experts"),
    "backend.kind": ("torch", "cuda"),
    "backend.in_place": ("cpu", "gpu"),
    "backend.driven_by": ("host", "device"),
    "backend.router": ("model", "fused"),
    "tracking.mode": ("offline", "online", "disabled"),
}

ANY_ON_DEVICE: dict[str, Any] = {"scope": "global", "prefetch_admission": "staging", "preload": "none"}
ON_DEVICE = {  # caches whose rules the device-driven runtime's planner has, with the values of the knobs that it knows
    "prefetch.cache.lru.Lru": ANY_ON_DEVICE,
    "prefetch.cache.slru.Slru": ANY_ON_DEVICE | {"variant": "original", "victim": "tail", "fill": True},
}


@dataclass
class ModelConfig:
    path: str = MISSING
    dtype: str = "float32"
    expert_format: str = PLAIN
    expert_group: int | None = None
    pack_dir: str = ".cache/packs"


@dataclass
class TierConfig:
    kind: str = MISSING
    n_threads: int = MISSING
    chunk_bytes: int = MISSING
    verify: bool = False
    link: Any = None  # null, or {bytes_per_s, latency_s}


@dataclass
class WorkloadConfig:
    prompts: str | None = None
    text: str | None = None
    n_prompts: int = 8
    new_tokens: int = 96
    batch_size: int = 1
    max_prompt_tokens: int = 384
    warmup_batches: int = 1
    temperature: float = 1.0


@dataclass
class BackendConfig:
    kind: str = "torch"
    n_threads: int = 1
    memory: str | None = None  # of the GPU, e.g. "12GB"
    in_place: str = "cpu"
    driven_by: str = "host"
    router: str = "model"


@dataclass
class TrackingConfig:
    mode: str = MISSING
    project: str = MISSING


@dataclass
class CollectConfig:
    hidden_states: bool = MISSING
    shard_rows: int = MISSING


@dataclass
class DocumentsConfig:
    source: str = MISSING  # workload | bundled
    training: int = 0
    held_out: int = 0
    shifted: int = 0
    prompt_tokens: int = 384
    new_tokens: int = 0


@dataclass
class DecodeConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: Any = MISSING
    predictor: Any = MISSING
    planner: Any = MISSING
    tier: TierConfig = field(default_factory=TierConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    arms: dict[str, Any] = field(default_factory=dict)  # name -> list of overrides; null leaves an arm out
    repeats: int = 3
    seed: int = 0
    check_tokens: bool = True
    timeline_forwards: int = 24
    collect: CollectConfig | None = None  # this and `documents` are read by experiments.collect alone
    documents: DocumentsConfig | None = None


@dataclass
class ShapeConfig:
    name: str = MISSING
    expert_bytes: int | None = None
    dense_bytes: float | None = None


@dataclass
class ReplayedConfig:
    """What is common to programs that replay a trace."""

    trace: str = MISSING
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    machine: Any = MISSING
    cache: Any = MISSING
    planner: Any = MISSING
    warmup_sequences: int = 1
    max_sequences: int | None = None
    seed: int = 0


@dataclass
class ReplayConfig(ReplayedConfig):
    predictor: Any = MISSING
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    arms: dict[str, Any] = field(default_factory=dict)  # as in DecodeConfig
    run: str | None = None
    timeline_forwards: int = 24


@dataclass
class BreakEvenConfig(ReplayedConfig):
    links: list[float] = MISSING
    accuracies: list[float] = MISSING
    slots: list[float] = MISSING
    lookahead: int = 1
    n_jobs: int = -1


def register() -> None:
    """Make the typed schemas known to Hydra, and how a sweep names its jobs' folders."""
    ConfigStore.instance().store(name="decode_schema", node=DecodeConfig)
    ConfigStore.instance().store(name="replay_schema", node=ReplayConfig)
    ConfigStore.instance().store(name="break_even_schema", node=BreakEvenConfig)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def folder_name(overrides: str) -> str:
    """The overrides of a sweep's job as one folder's name, which file systems limit to 255 bytes."""
    name = overrides.replace("/", "|") or "no overrides"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name.encode()[:LONGEST_NAME].decode(errors="ignore") + "..." + digest


def validate(cfg: DictConfig) -> None:
    """Refuse what types alone let through.

    Raises:
        ConfigError: naming the option at fault and what would be right.
    """
    _check_choices(cfg, CHOICES)
    _check_whole_numbers(
        cfg,
        {
            "repeats": 1,
            "workload.n_prompts": 1,
            "workload.new_tokens": 2,
            "workload.batch_size": 1,
            "workload.max_prompt_tokens": 1,
            "workload.warmup_batches": 0,
            "tier.n_threads": 1,
            "backend.n_threads": 1,
            "timeline_forwards": 0,
        },
    )
    if not cfg.workload.temperature >= 0:
        raise ConfigError(f"workload.temperature={cfg.workload.temperature}: it must be at least 0 (0 = greedy)")
    _check_link(cfg.tier.link)
    _check_backend(cfg)
    n_batches = cfg.workload.n_prompts // cfg.workload.batch_size
    if cfg.workload.warmup_batches >= n_batches:
        raise ConfigError(
            f"workload.warmup_batches={cfg.workload.warmup_batches} leaves none of the {n_batches} batches to measure: raise "
            "workload.n_prompts"
        )
    _check_plug_ins(cfg)
    if cfg.backend.driven_by == "device":
        _check_driven_by_device(cfg)


def validate_replay(cfg: DictConfig) -> None:
    """Likewise, of a program that replays a trace.

    Raises:
        ConfigError: naming the option at fault and what would be right.
    """
    if cfg.get("run", "") is None and "${run}" in str(OmegaConf.to_container(cfg)):
        raise ConfigError("run is missing: give run=..., the folder of a run of experiments.decode")
    for node, key, option in ((cfg, "trace", "trace"), (cfg.machine, "run", "machine.run")):
        if OmegaConf.is_missing(node, key):
            raise ConfigError(f"{option} is missing: give {option}=...")
    _check_choices(cfg, {option: choices for option, choices in CHOICES.items() if option.split(".")[0] in cfg})
    _check_whole_numbers(cfg, {option: 0 for option in ("warmup_sequences", "timeline_forwards") if option in cfg})
    _check_plug_ins(cfg)
    check_knobs("machine", cfg.machine)
    if cfg.shape.dense_bytes is not None and not cfg.shape.dense_bytes >= 0:
        raise ConfigError(f"shape.dense_bytes={cfg.shape.dense_bytes}: it must be at least 0")
    if cfg.cache.preload != "none":
        raise ConfigError(f"cache.preload={cfg.cache.preload}: a replay begins with an empty cache; choose none")


def _check_choices(cfg: DictConfig, choices_of: Mapping[str, tuple[str, ...]]) -> None:
    for option, choices in choices_of.items():
        value = OmegaConf.select(cfg, option)
        if value not in choices:
            raise ConfigError(f"{option}={value}: choose one of {', '.join(choices)}")


def _check_whole_numbers(cfg: DictConfig, least_of: Mapping[str, int]) -> None:
    for option, least in least_of.items():
        value = OmegaConf.select(cfg, option)
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{option}={value}: it must be a whole number, at least {least}")


def _check_plug_ins(cfg: DictConfig) -> None:
    """Cache, predictor and planner, whatever else a program has."""
    _check_whole_numbers(cfg, {"cache.staging": 0, "cache.transient": 1})
    check_knobs("cache", cfg.cache, given=("capacity",), common=CACHE_COMMON)
    if "predictor" in cfg:
        check_knobs("predictor", cfg.predictor)
    check_knobs("planner", cfg.planner)
    if cfg.cache.prefetch_admission == "policy" and not get_class(cfg.cache._target_).admits_prefetch:
        raise ConfigError(
            f"cache.prefetch_admission=policy, but {cfg.cache._target_} does not admit prefetches: use an slru cache, or staging"
        )


def _check_link(link: Any) -> None:
    if link is None:
        return
    if not isinstance(link, DictConfig) or set(link) != {"bytes_per_s", "latency_s"}:
        raise ConfigError(f"tier.link={link}: it must be null, or have bytes_per_s and latency_s and nothing else")
    if not all(isinstance(value, int | float) for value in link.values()) or link.bytes_per_s <= 0 or link.latency_s < 0:
        raise ConfigError(f"tier.link={link}: bytes_per_s must be above 0 and latency_s at least 0, both plain numbers")


def _check_backend(cfg: DictConfig) -> None:
    backend = cfg.backend
    if backend.kind == "cuda" and cfg.tier.kind != "host":
        raise ConfigError(f"backend=cuda copies experts out of pinned RAM, and tier.kind={cfg.tier.kind}: choose tier=pinned")
    of_a_gpu = {"memory": None, "in_place": "cpu", "driven_by": "host", "router": "model"}
    if backend.kind == "torch" and any(backend[knob] != default for knob, default in of_a_gpu.items()):
        raise ConfigError(
            "backend.memory, backend.in_place=gpu, backend.driven_by=device and backend.router=fused are about a GPU: choose backend=cuda, or "
            "leave them out"
        )


def _check_driven_by_device(cfg: DictConfig) -> None:
    """Its books are kernels: what they do not know is refused, not left out in silence."""
    from prefetch.device_runtime import asks_host  # brings Triton, which other runs do without

    cache, planner = cfg.cache, cfg.planner._target_
    if cache._target_ not in ON_DEVICE:
        raise ConfigError(f"backend.driven_by=device, but cache._target_={cache._target_}: choose cache=lru or cache=slru")
    for knob, right in ON_DEVICE[cache._target_].items():
        if cache[knob] != right:
            raise ConfigError(f"backend.driven_by=device, but cache.{knob}={cache[knob]}: it can only be {str(right).lower()}")
    if asks_host(get_class(cfg.predictor._target_)):
        raise ConfigError(
            f"backend.driven_by=device, but predictor._target_={cfg.predictor._target_} asks the host: choose one that computes on the "
            "device after the router, such as gate_reuse, or none"
        )
    if planner not in ("prefetch.planner.top_m.TopM", "prefetch.planner.none.NoPrefetch"):
        raise ConfigError(f"backend.driven_by=device, but planner._target_={planner}: choose planner=top_m or none")
    if cfg.planner.get("max_queued_experts") is not None:
        raise ConfigError("backend.driven_by=device has no queue of prefetches: leave planner.max_queued_experts=null")
    if cfg.tier.link is not None or cfg.tier.verify:
        raise ConfigError(
            "backend.driven_by=device copies by kernels, which tier.link and tier.verify know nothing of: leave them out"
        )


def compose_policy(cache: DictConfig, capacity: int, n_layers: int) -> Any:
    """The cache policy that `cache` describes, for `capacity` experts, over all layers or split among them."""
    from prefetch.cache.per_layer import PerLayer

    knobs = {key: value for key, value in cache.items() if key not in CACHE_COMMON}
    make: Callable[[int], Any] = instantiate(OmegaConf.create(knobs))
    return make(capacity) if cache.scope == "global" else PerLayer(capacity, n_layers, make)


def repository_path(path: str) -> Path:
    """`path` as it is if absolute or present here, else relative to the repository."""
    found = Path(path)
    return found if found.is_absolute() or found.exists() else REPOSITORY / found


def check_knobs(group: str, node: Any, given: tuple[str, ...] = (), common: tuple[str, ...] = ()) -> None:
    """Raise ConfigError unless every key of `node`, the plug-in chosen in `group`, is an argument of its class, and every plain value is of
    the type that the class declares.

    Args:
        given: arguments that no configuration gives.
        common: keys that are not the class's.
    """
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if not target:
        raise ConfigError(f"{group} has no _target_: name the class to use, e.g. through {group}=NAME")
    try:
        known = inspect.signature(get_class(target), eval_str=True).parameters
    except (hydra.errors.HydraException, ImportError, ValueError, NameError) as error:
        raise ConfigError(f"{group}._target_={target} cannot be imported: {str(error).splitlines()[0]}") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key, value in node.items():
        if key in common or str(key).startswith("_"):
            continue
        if key in known:
            _check_value(f"{group}.{key}", value, known[str(key)].annotation)
        elif not takes_any:
            options = ", ".join([*common, *(name for name in known if name not in given)]) or "none"
            raise ConfigError(f"{group}.{key} is not an option of {target}; its options are: {options}")


def _check_value(option: str, value: Any, declared: Any) -> None:
    """A nested plug-in is checked like any other; what a class does not declare, or declares as its own kind, it checks."""
    if isinstance(value, DictConfig) and "_target_" in value:
        check_knobs(option, value)
        return
    parts = get_args(declared) or (declared,)
    if not all(part in PLAIN_TYPES for part in parts):
        return
    try:
        TypeAdapter(declared).validate_python(OmegaConf.to_object(value) if OmegaConf.is_config(value) else value, strict=True)
    except ValidationError as error:
        names = " or ".join("null" if part is type(None) else part.__name__ for part in parts)
        raise ConfigError(f"{option}={value}: it must be of type {names}") from error
