"""Routing by pre-gates: the router of MoE layer N + level runs with the head's weights on the router input of layer N.

Nothing else of the model changes: top-k, normalisation and the experts' own input stay the architecture's. Layers before `level`
have no layer to be selected from and keep their own gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prefetch.pre_gate import PreGates


@torch.no_grad()
def route_by(routers: Sequence[nn.Module], pre_gates: PreGates) -> None:
    """Let the heads of `pre_gates` decide from now on; `routers` are those of all MoE layers, in order.

    A router's weights are replaced by those of the head that selects for it, in its own dtype; gradients reach them.
    """
    for router, head in zip(routers[pre_gates.level :], pre_gates.heads, strict=True):
        assert isinstance(router.weight, Tensor)
        router.weight.copy_(head)
    route_early(routers, pre_gates.level)


def route_early(routers: Sequence[nn.Module], level: int) -> None:
    """From now on the router of MoE layer n sees the router input of layer n - `level`; the first `level` see their own."""
    inputs: dict[int, Tensor] = {}
    for layer, router in enumerate(routers):
        router.register_forward_pre_hook(_earlier_input(inputs, layer, level))


def _earlier_input(inputs: dict[int, Tensor], layer: int, level: int) -> Callable:
    def hook(router: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        inputs[layer] = args[0]
        return args if layer < level else (inputs.pop(layer - level),)

    return hook
