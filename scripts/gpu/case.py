"""One call of one operation: ours, what others offer, the exact answer, and what any implementation has to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scripts.gpu.shapes import MoEShape


@dataclass(frozen=True)
class Case:
    """Callables return what is compared: logits, the layer's output, or a cache's books."""

    ours: Callable[[], Tensor]
    exact: Callable[[], Tensor]  # in float64, or integers
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)  # in the weights' dtype
    reads: tuple[Tensor, Tensor] | None = None  # uint8 [n, bytes] and int32, which rows of it; None where it is next to nothing


MakeCase = Callable[
    [MoEShape, int, torch.dtype, str, int], Case | None
]  # shape, tokens, dtype, device, seed; None: does not apply
