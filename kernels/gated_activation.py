"""The gate of an expert's MLP: silu(gate) * up, and gpt-oss's clamped form of it, as one formula.

y = gate * sigmoid(alpha * gate) * (up + up_shift), with gate limited from above and up from both sides where `limit` is set.
Source of the clamped form: transformers, `GptOssExperts` (alpha 1.702, limit 7, shift 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class GatedActivation:
    """Constants of the formula above."""

    alpha: float = 1.0
    limit: float | None = None
    up_shift: float = 0.0

    @property
    def constants(self) -> dict[str, float | None]:
        """As the constexprs of a kernel that calls `gated_activation`."""
        return {"ALPHA": self.alpha, "LIMIT": self.limit, "UP_SHIFT": self.up_shift}


SWIGLU = GatedActivation()
CLAMPED_SWIGLU = GatedActivation(alpha=1.702, limit=7.0, up_shift=1.0)


def gated_activation_reference(gate: Tensor, up: Tensor, activation: GatedActivation) -> Tensor:
    """The formula in PyTorch, in the dtype of its arguments (two tensors of one shape)."""
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.up_shift)


@triton.jit
def gated_activation(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The formula on two fp32 blocks of one shape. NaN stays NaN."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate * tl.sigmoid(ALPHA * gate) * (up + UP_SHIFT)
