"""One routed expert out of a checkpoint, whichever way its tensors are stored there."""

from __future__ import annotations

import torch
from torch import Tensor

from prefetch.checkpoint import Checkpoint
from prefetch.errors import CheckpointError
from prefetch.families import Family, n_experts

STACK = "model."  # what the names of the decoder layers begin with


def load_expert(
    checkpoint: Checkpoint, family: Family, layer: int, expert: int, gate_up: Tensor, down: Tensor, root: str = STACK
) -> None:
    """Convert one expert of *decoder* layer `layer` into `gate_up` [2I, H] and `down` [H, I].

    Args:
        root: the names begin with this; other than the stack's for layers beside it.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or holds NaN or Inf (also by overflow of the dtype).
    """
    intermediate = down.shape[1]
    fused = root + family.fused_gate_up.format(layer=layer) in checkpoint
    if fused:
        parts = {family.fused_gate_up: gate_up, family.fused_down: down}
    else:
        parts = {family.gate: gate_up[:intermediate], family.up: gate_up[intermediate:], family.down: down}
    for template, into in parts.items():
        name = root + template.format(layer=layer, expert=expert)
        if fused:
            shape = tuple(into.shape[::-1] if family.transposed else into.shape)
            source = checkpoint.read(name, (n_experts(checkpoint.config), *shape), index=expert)
            source = source.T if family.transposed else source
        else:
            source = checkpoint.read(name, tuple(into.shape))
        into.copy_(gate_then_up(source) if fused and family.interleaved and into is gate_up else source)
        if not _is_finite(into):
            raise CheckpointError(f"{checkpoint.folder}: {name} (expert {expert}) {_not_finite(source, into.dtype)}")


def gate_then_up(rows: Tensor) -> Tensor:
    """Rows gate, up, gate, up, ... [2I, ...] sorted: all of the gate, then all of up."""
    return torch.cat([rows[0::2], rows[1::2]])


def _is_finite(weights: Tensor) -> bool:
    """Extremes are NaN if any element is, and take a twentieth of the time of `isfinite` on every bfloat16 element."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(weights))).all())


def _not_finite(source: Tensor, dtype: torch.dtype) -> str:
    if _is_finite(source):
        return f"holds {source.abs().max():.3g}, too large for {dtype}; pack as bfloat16 or float32"
    return "holds NaN or Inf; the checkpoint is damaged or its training diverged"
