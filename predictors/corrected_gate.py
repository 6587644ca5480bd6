"""Corrected gate: the target layer's own router, frozen, on a state that a small trained adapter has moved forward.

After SpecPrefetch (arXiv 2607.24787): logits = W (x + B gelu(A x)) + V gelu(U x) with x = norm_target(residual), W the target's
router, A and B one low-rank adapter for all layers, U and V a small residual head per target; trained towards the router's own
distribution (KL). B and V start at zero, so training starts exactly at gate reuse and can only keep what is better on held-out
tokens. The paper's rank is 64; how its residual head is shaped was not seen in text.

Cost: 2 * H * rank shared parameters, and width * (H + E) per target layer; per token and layer 2 FLOPs for each of them and
2 * H * E for the router.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, kl_div

from kernels.predict_corrected_gate import MAX_RANK, CorrectedGateHead
from predictors.base import LayerView, ModelView
from predictors.learned import LearnedPredictor, Truth, read_feature
from predictors.linear_router import router_matrix
from predictors.one_launch import CorrectedGateLaunch, OneLaunch


@dataclass
class CorrectedGate(LearnedPredictor):
    """Gate reuse plus a correction that begins at zero."""

    rank: int = 64  # of the adapter that all layers share
    width: int = 64  # of the residual head of each target layer

    name = "corrected_gate"
    needs_residual = True

    def build(self) -> nn.Module:
        """Adapter and heads; they start as gate reuse."""
        return GateCorrection(self.model, list(self.targets()), self.rank, self.width)

    def launches(self) -> dict[int, OneLaunch]:
        """All targets, where the norm is known to be an RMS norm, routers have no bias, and the ranks are within the kernel's."""
        model, network = self.model, self.network
        assert isinstance(network, GateCorrection)
        if model.norm_epsilon is None or self.rank + self.width > MAX_RANK:
            return {}
        found: dict[int, OneLaunch] = {}
        for target in self.targets():
            router, bias = router_matrix(model, target, model.dtype)
            if not bool(bias.any()):
                found[target] = CorrectedGateLaunch(network.folded(target, router))
        return found

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """KL(router || prediction), mean over tokens."""
        wanted = truth.router_logits.log_softmax(-1)
        return kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)


class GateCorrection(nn.Module):
    """The network; the model's routers and norms are called, not owned: they are no part of the weights."""

    def __init__(self, model: ModelView, targets: list[int], rank: int, width: int):
        super().__init__()
        self.model = model
        self.down = nn.Linear(model.hidden_size, rank, bias=False)
        self.up = zeroed(nn.Linear(rank, model.hidden_size, bias=False))
        self.heads = nn.ModuleDict(
            {
                str(target): nn.Sequential(
                    nn.Linear(model.hidden_size, width, bias=False),
                    nn.GELU(),
                    zeroed(nn.Linear(width, model.n_experts, bias=False)),
                )
                for target in targets
            }
        )

    def forward(self, seen: LayerView, target: int) -> Tensor:
        """Logits [T, E] for layer `target` from the residual that `seen` holds."""
        read_feature(seen, "residual")
        assert seen.residual is not None
        router_input = self.model.pre_moe_norm[target](seen.residual)
        x = router_input.float()
        moved = x + self.up(gelu(self.down(x)))
        gate = self.model.router_logits[target](moved.to(router_input.dtype)).float()
        logits: Tensor = gate + self.heads[str(target)](x)
        return logits

    def folded(self, target: int, router: Tensor) -> CorrectedGateHead:
        """The weights for layer `target`, whose router is [E, H], as the kernel reads them."""
        head, epsilon = self.heads[str(target)], self.model.norm_epsilon
        assert isinstance(head, nn.Sequential) and epsilon is not None
        ones = torch.ones(1, self.model.hidden_size, device=router.device)
        norm = self.model.pre_moe_norm[target](ones)[0].float() * (1 + epsilon) ** 0.5  # of ones it makes its weight, scaled
        layers = self.down, self.up, head[0], head[2]
        down, up, enter, leave = (layer.weight.detach() for layer in layers if isinstance(layer, nn.Linear))
        return CorrectedGateHead.folded(norm.detach(), epsilon, router, (down, up), (enter, leave))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The same layer with weights of zero: a branch that begins by saying nothing."""
    torch.nn.init.zeros_(layer.weight)
    return layer
