"""The table of hot experts (PreScope, arXiv 2509.23638): how many tokens each expert served on text seen before.

The paper ranks (layer, expert) by token volume and has the first of them in fast memory when a run starts; the table is no input of
its predictor. Kept as the weights of trained predictors are, so that a table of another model is refused. Cost: L * E integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from predictors import weights as weights_file
from predictors.base import ModelView
from prefetch.geometry import ExpertKey
from prefetch.trace import RoutingTrace

NAME = "hot_experts"


def token_counts(traces: Iterable[RoutingTrace], n_layers: int, n_experts: int) -> Tensor:
    """Tokens that each expert served in `traces`, int64 [L, E]."""
    counts = np.zeros((n_layers, n_experts), np.int64)
    for trace in traces:
        for layer in range(n_layers):
            counts[layer] += np.bincount(trace.topk_ids[:, layer].reshape(-1), minlength=n_experts)
    return torch.from_numpy(counts)


def hottest_first(counts: Tensor) -> list[ExpertKey]:
    """The experts of `counts` [L, E] that served any token, by falling count; equal ones by layer, then number."""
    n_experts = counts.shape[1]
    order = counts.flatten().argsort(descending=True, stable=True).tolist()
    return [ExpertKey(*divmod(index, n_experts)) for index in order[: int(counts.count_nonzero())]]


def save(path: Path, counts: Tensor, model: ModelView, measured: Mapping[str, Any]) -> None:
    """Write `counts` [L, E] to `path`, complete or not at all; `measured` says how they came about (plain JSON)."""
    weights_file.write(path, {"token_counts": counts}, _identity(model), measured)


def load(path: Path, model: ModelView) -> Tensor:
    """The table in `path`, int64 [L, E].

    Raises:
        PredictorError: it is missing, damaged, or of another model.
    """
    tensors = weights_file.read(path, _identity(model), f"python -m experiments.hot_experts output={path}")
    weights_file.check_shapes(path, tensors, {"token_counts": torch.empty(model.n_layers, model.n_experts, device="meta")})
    return tensors["token_counts"]


def _identity(model: ModelView) -> dict[str, Any]:
    return {"family": NAME, **weights_file.model_identity(model)}
