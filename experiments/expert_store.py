"""The expert store that `model` asks for: which checkpoint, and what its experts are packed as."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from experiments.config import PLAIN, repository_path
from kernels.quantised import GROUPS, QuantFormat
from prefetch.errors import ConfigError, KernelInputError
from prefetch.store import ExpertStore


def open_store(model: DictConfig) -> ExpertStore:
    """The packed experts of `model.path` as `model.dtype`, or quantised as `model.expert_format` and `model.expert_group` say.

    Raises:
        ConfigError: there is no such format, or it does not fit the experts' sizes or weights.
        CheckpointError, UnsupportedModelError, PackError: as `ExpertStore.open` does.
    """
    how = quant_format(model)
    folder, dtype = repository_path(model.path), getattr(torch, model.dtype)
    try:
        return ExpertStore.open(folder, dtype, repository_path(model.pack_dir), how)
    except KernelInputError as error:
        raise ConfigError(
            f"model.expert_format={model.expert_format}, model.expert_group={model.expert_group}: {error}"
        ) from error


def quant_format(model: DictConfig) -> QuantFormat | None:
    """How experts are quantised, None where they are not. Without a group: the format's smallest, which loses least.

    Raises:
        ConfigError: there is no such format, or none with this group.
    """
    kind, group = model.expert_format, model.expert_group
    if kind == PLAIN:
        if group is not None:
            raise ConfigError(f"model.expert_group={group} is for quantised experts: choose a model.expert_format")
        return None
    try:
        return QuantFormat(kind, GROUPS[kind][-1] if group is None and kind in GROUPS else group)
    except KernelInputError as error:
        raise ConfigError(f"model.expert_format={kind}, model.expert_group={group}: {error}") from error


def refuse_quantised(model: DictConfig, program: str) -> None:
    """Stop a program that needs the experts as the checkpoint has them.

    Raises:
        ConfigError: `model` asks for others.
    """
    if model.expert_format != PLAIN:
        raise ConfigError(f"model.expert_format={model.expert_format}: {program} works on unquantised experts ({PLAIN})")
