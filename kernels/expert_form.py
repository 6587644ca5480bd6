"""What the experts of one MoE layer compute with their two matrices: the gate's formula, and biases where they have some.

expert(x) = down @ gated(gate_up @ x + gate_up_bias) + down_bias

Biases always are in memory, unlike the matrices: they are a few of the row's per mille (gpt-oss: 17 KB an expert of 50 MB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.expert_mlp import Operands, expert_mlp, expert_mlps
from kernels.gated_activation import SWIGLU, GatedActivation, gated_activation_reference


@dataclass(frozen=True)
class ExpertForm:
    """The form of one layer's E experts.

    Args:
        activation: the gate's formula.
        gate_up_bias: [E, 2I], gate then up; down_bias: [E, H]; both or neither, in the experts' dtype.
    """

    activation: GatedActivation = SWIGLU
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def to(self, device: torch.device) -> ExpertForm:
        """The same form on `device`."""
        if self.gate_up_bias is None or self.down_bias is None:
            return self
        return replace(self, gate_up_bias=self.gate_up_bias.to(device), down_bias=self.down_bias.to(device))

    def mlp(self, expert: int, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """One expert on the tokens routed to it, on the CPU.

        Args:
            expert: which of the layer's, for its biases.
            x: [n, H]; gate_up: [2I, H]; down: [H, I]; all in one dtype.

        Returns:
            [n, H], not yet weighted.
        """
        if self.is_plain:
            return expert_mlp(x, gate_up, down)
        gate, up = F.linear(x, gate_up, self._bias(self.gate_up_bias, expert, x)).chunk(2, dim=1)
        gated = gated_activation_reference(gate, up, self.activation)
        return F.linear(gated, down, self._bias(self.down_bias, expert, x))

    def mlps(self, experts: Sequence[int], xs: Sequence[Tensor], operands: Sequence[Operands]) -> list[Tensor]:
        """Several experts, each on its own tokens, with the same bits as one at a time.

        Args:
            experts: which of the layer's.
            xs: for each its inputs, [n, H]; operands: for each gate_up.t() [H, 2I] and down.t() [I, H].

        Returns:
            For each [n, H], not yet weighted.
        """
        if self.is_plain:
            return expert_mlps(xs, operands)
        return [
            self.mlp(expert, x, gate_up.t(), down.t()) for expert, x, (gate_up, down) in zip(experts, xs, operands, strict=True)
        ]

    @property
    def parts(self) -> tuple[GatedActivation, Tensor | None, Tensor | None]:
        """As the arguments of a `MoECall` of that name: activation, gate_up_bias, down_bias."""
        return self.activation, self.gate_up_bias, self.down_bias

    @property
    def has_biases(self) -> bool:
        return self.gate_up_bias is not None

    @property
    def is_plain(self) -> bool:
        """SwiGLU without biases, which `kernels.expert_mlp` computes."""
        return self.activation == SWIGLU and not self.has_biases

    def _bias(self, biases: Tensor | None, expert: int, x: Tensor) -> Tensor | None:
        return None if biases is None else biases[expert].to(x)


PLAIN = ExpertForm()
