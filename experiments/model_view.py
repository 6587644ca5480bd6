"""The routers, norms and sizes of a model without its experts: all that training and judging predictors need."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from experiments.config import repository_path
from predictors.base import ModelView
from prefetch.errors import ConfigError
from prefetch.families import family_of, moe_geometry
from prefetch.geometry import MoEGeometry
from prefetch.model import load_offloaded, model_view


def load_model_view(cfg: DictConfig) -> tuple[ModelView, MoEGeometry]:
    """What `cfg.model` names; no expert is loaded.

    Raises:
        CheckpointError: the model is missing or damaged.
        UnsupportedModelError: its architecture is not known.
        ConfigError: its pre-gates route it.
    """
    folder, dtype = repository_path(cfg.model.path), getattr(torch, cfg.model.dtype)
    model = load_offloaded(folder, dtype).requires_grad_(False)
    if model.pre_gates is not None and model.pre_gates.route:
        raise ConfigError(f"{folder}: its pre-gates route it, so there is nothing to predict; use the model it was made from")
    geometry = moe_geometry(model.config, dtype)
    return model_view(model, family_of(model.config), geometry), geometry
