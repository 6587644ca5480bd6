"""One routed expert out of a checkpoint, whichever way its tensors are stored there: alone, fused, or fused and quantised.

mxfp4 as gpt-oss ships it: for every tensor `name` of E matrices [R, C], `name`_blocks, uint8 [E, R, C / 32, 16], and `name`_scales, uint8
[E, R, C / 32]. A byte holds two neighbouring weights, the first in its low nibble; a weight is its e2m1 value times 2^(scale - 127). Every such
product is a bfloat16, and `kernels.quantised` finds codes for exactly these numbers again: neither a bfloat16 nor an mxfp4 pack rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quantised import E2M1_VALUES, E8M0_BIAS
from prefetch.checkpoint import BYTES, Checkpoint
from prefetch.errors import CheckpointError
from prefetch.families import Family, n_experts

STACK = "model."  # what the names of the decoder layers begin with
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32  # weights that share a scale


def load_expert(
    checkpoint: Checkpoint, family: Family, layer: int, expert: int, gate_up: Tensor, down: Tensor, root: str = STACK
) -> None:
    """Convert one expert of *decoder* layer `layer` into `gate_up` [2I, H] and `down` [H, I].

    Args:
        root: the names begin with this; other than the stack's for layers beside it.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or holds NaN or Inf (also by overflow of the dtype).
    """
    fused_gate_up, fused_down = (root + name.format(layer=layer) for name in (family.fused_gate_up, family.fused_down))
    if fused_gate_up in checkpoint or fused_gate_up + BLOCKS in checkpoint:
        rows = _fused(checkpoint, family, fused_gate_up, expert, tuple(gate_up.shape))
        _store(checkpoint, fused_gate_up, expert, gate_then_up(rows) if family.interleaved else rows, gate_up)
        _store(checkpoint, fused_down, expert, _fused(checkpoint, family, fused_down, expert, tuple(down.shape)), down)
        return
    gate, up = gate_up.chunk(2)
    for template, into in ((family.gate, gate), (family.up, up), (family.down, down)):
        name = root + template.format(layer=layer, expert=expert)
        _store(checkpoint, name, expert, checkpoint.read(name, tuple(into.shape)), into)


def gate_then_up(rows: Tensor) -> Tensor:
    """Rows gate, up, gate, up, ... [2I, ...] sorted: all of the gate, then all of up."""
    return torch.cat([rows[0::2], rows[1::2]])


def _fused(checkpoint: Checkpoint, family: Family, name: str, expert: int, shape: tuple[int, ...]) -> Tensor:
    """Matrix `expert` of a fused tensor, `shape` [rows, columns], its rows in the checkpoint's order."""
    n, (rows, columns) = n_experts(checkpoint.config), shape
    if name in checkpoint:
        stored = (columns, rows) if family.transposed else (rows, columns)
        source = checkpoint.read(name, (n, *stored), index=expert)
        return source.T if family.transposed else source
    blocks = checkpoint.read(name + BLOCKS, (n, rows, columns // GROUP, GROUP // 2), index=expert, dtypes=BYTES)
    scales = checkpoint.read(name + SCALES, (n, rows, columns // GROUP), index=expert, dtypes=BYTES)
    return from_mxfp4(blocks, scales)


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """float32 [rows, columns] of uint8 blocks [rows, groups, 16] and scales [rows, groups]."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = E2M1_VALUES.index_select(0, codes.flatten().int()).view(codes.shape)
    return torch.ldexp(values, (scales.int() - E8M0_BIAS)[..., None]).flatten(-2)


def _store(checkpoint: Checkpoint, name: str, expert: int, source: Tensor, into: Tensor) -> None:
    into.copy_(source)
    if not _is_finite(into):
        raise CheckpointError(f"{checkpoint.folder}: {name} (expert {expert}) {_not_finite(source, into.dtype)}")


def _is_finite(weights: Tensor) -> bool:
    """Extremes are NaN if any element is, and take a twentieth of the time of `isfinite` on every bfloat16 element."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(weights))).all())


def _not_finite(source: Tensor, dtype: torch.dtype) -> str:
    if _is_finite(source):
        return f"holds {source.abs().max():.3g}, too large for {dtype}; pack as bfloat16 or float32"
    return "holds NaN or Inf; the checkpoint is damaged or its training diverged"
