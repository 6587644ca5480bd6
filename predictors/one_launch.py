"""A trained head as one launch on a GPU: the kernel that computes what its network computes, out of the network's own weights.

In PyTorch a head of a few hundred numbers is ten launches of some microseconds each, whatever it computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kernels.guesses import Guesses
from kernels.launch import Launch, check_launchable
from kernels.predict_corrected_gate import CorrectedGateCall, CorrectedGateHead, corrected_gate_launch
from kernels.predict_mlp import MlpCall, MlpHead, predict_launch
from kernels.repeated_launch import RepeatedLaunch
from predictors.base import LayerView


class OneLaunch(ABC):
    """Called with what a layer has seen, it gives logits float32 [T, E] for its target. At one token it is checked once, and repeated."""

    def __init__(self) -> None:
        self._of_one_token: RepeatedLaunch | None = None
        self._logits = torch.empty(0)  # its own [1, E]

    def __call__(self, seen: LayerView) -> Tensor:
        tensors = self.tensors(seen)
        n_tokens = len(seen.token_ids)
        if n_tokens == 1 and self._of_one_token is not None:
            logits = torch.empty_like(self._logits)
            self._of_one_token.run(1, {**tensors, "logits_ptr": logits})
            return logits
        arrivals = torch.zeros(n_tokens, dtype=torch.int32, device=seen.hidden.device)
        launch, out = self.launch(tensors, arrivals)
        check_launchable(seen.hidden.device)
        launch.run()
        if n_tokens == 1:
            self._of_one_token, self._logits = RepeatedLaunch(launch), out.logits
        return out.logits

    @abstractmethod
    def tensors(self, seen: LayerView) -> dict[str, Tensor]:
        """What the kernel reads of `seen`, by argument."""

    @abstractmethod
    def launch(self, tensors: dict[str, Tensor], arrivals: Tensor) -> tuple[Launch, Guesses]:
        """The launch, checked, and where it writes to."""


class MlpLaunch(OneLaunch):
    """PreScope's network by `kernels.predict_mlp`."""

    def __init__(self, head: MlpHead):
        super().__init__()
        self.head = head

    def tensors(self, seen: LayerView) -> dict[str, Tensor]:
        states = seen.hidden, seen.topk_ids, seen.topk_weights.float()
        return dict(zip(("x_ptr", "topk_ids_ptr", "topk_weights_ptr"), (s.contiguous() for s in states), strict=True))

    def launch(self, tensors: dict[str, Tensor], arrivals: Tensor) -> tuple[Launch, Guesses]:
        call = MlpCall(self.head, tensors["x_ptr"], tensors["topk_ids_ptr"], tensors["topk_weights_ptr"])
        out = call.new_result(n_guesses=1)
        return predict_launch(call, out, arrivals), out


class CorrectedGateLaunch(OneLaunch):
    """The corrected gate by `kernels.predict_corrected_gate`, its norm in fp32 where a 16-bit model would round."""

    def __init__(self, head: CorrectedGateHead):
        super().__init__()
        self.head = head

    def tensors(self, seen: LayerView) -> dict[str, Tensor]:
        assert seen.residual is not None, "needs_residual is set"
        return {"residual_ptr": seen.residual.contiguous()}

    def launch(self, tensors: dict[str, Tensor], arrivals: Tensor) -> tuple[Launch, Guesses]:
        call = CorrectedGateCall(self.head, tensors["residual_ptr"])
        out = call.new_result(n_guesses=1)
        return corrected_gate_launch(call, out, arrivals), out
