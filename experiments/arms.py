"""The arms of a comparison: each is the command line's configuration with overrides of its own on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from experiments import launch
from experiments.config import CACHE_COMMON
from experiments.results import BASELINE, BOUND, PREDICTOR
from prefetch.errors import ConfigError


def compose_arms(
    cfg: DictConfig, check: Callable[[DictConfig], None], defaults: Callable[[list[str]], list[str]] = lambda given: []
) -> dict[str, DictConfig]:
    """Every arm's full configuration.

    Where an arm chooses another file of a group, the command line's knobs of that group do not apply to it, but for those
    that all caches share.

    Args:
        check: raises ConfigError for an arm's configuration that cannot be.
        defaults: overrides to add to those that an arm is given.

    Raises:
        ConfigError: naming the arm.
    """
    hydra_cfg = HydraConfig.get()
    given = [override for override in hydra_cfg.overrides.task if not override.lstrip("+~").startswith("arms.")]
    named = {name: overrides for name, overrides in cfg.arms.items() if overrides is not None}
    if not named:
        raise ConfigError("no arm is left: name at least one, e.g. \"+arms.mine=['predictor=gate_reuse']\"")
    arms = {}
    for name, overrides in named.items():
        if not OmegaConf.is_list(overrides) or not all(isinstance(override, str) for override in overrides):
            raise ConfigError(f"arms.{name}={overrides}: it must be a list of overrides, e.g. ['cache=lru'], or null")
        chosen = {override.split("=")[0] for override in overrides}
        own = [*(override for override in given if _applies(override, chosen)), *overrides]
        try:
            arms[name] = compose(hydra_cfg.job.config_name, overrides=[*own, *defaults(own)])
            check(arms[name])
        except (ConfigError, HydraException) as error:
            raise ConfigError(f"arm {name}: {launch.one_line(error)}") from error
    return arms


def roles(arms: dict[str, DictConfig]) -> dict[str, str]:
    """What each arm is in the comparison; the first without prefetch is what the others are compared with."""
    found: dict[str, str] = {}
    for name, cfg in arms.items():
        found[name] = _role(cfg, BASELINE in found.values())
    return found


def rotated(names: Sequence[str], repeat: int) -> list[str]:
    """Each repeat begins with another arm, so that none always follows the same neighbour's mess."""
    shift = repeat % len(names)
    return [*names[shift:], *names[:shift]]


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
