"""A router as numbers: it is asked for what it makes of the basis."""

from __future__ import annotations

import torch
from torch import Tensor

from predictors.base import ModelView


@torch.no_grad()
def router_matrix(model: ModelView, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight [E, H] and bias [E] of the router of `layer`, float32; `dtype` is that in which it computes."""
    basis = torch.eye(model.hidden_size, dtype=dtype, device=model.device)
    router = model.router_logits[layer]
    bias = router(torch.zeros_like(basis[:1])).float()
    return (router(basis).float() - bias).T, bias[0]
