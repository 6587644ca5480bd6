"""A layer's router and its predictor's heads in one launch (`kernels.route_and_predict`), in place of the model's own router.

Heads that are linear in what the router reads, such as a later layer's router seen through the ratio of two norms, cost no launch of
their own then. Logits are summed and compared in fp32: in a 16-bit model, whose own router rounds them, experts that nearly tie may be
chosen otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.repeated_launch import RepeatedLaunch
from kernels.route_and_predict import route_and_predict, route_launch
from kernels.router_call import Routed, RouterCall
from kernels.routing import Routing
from predictors.base import LinearHead, Prediction


class FusedRouter:
    """Called like the model's router, and gives what that gives.

    Args:
        weight: [E, H], of the router; `bias`: [E], where it has one.
        heads: of the predictor; None: it has none here, and is asked as ever.
        routing: the router's rule.
        hear: takes the heads' guesses.

    Raises:
        KernelInputError: sizes that the kernel does not know; when it is first called.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        heads: Sequence[LinearHead] | None,
        routing: Routing,
        hear: Callable[[list[Prediction]], None],
    ):
        stack = [weight.detach(), *(head.weight.to(weight) for head in heads or ())]
        self.weights = torch.stack(stack)  # [1 + d, E, H]
        self.bias = _stacked([bias, *(head.bias for head in heads or ())], weight)
        self.targets = None if heads is None else [head.target for head in heads]
        self.routing, self.hear = routing, hear
        self.n_guesses = 1 if self.targets else 0  # the least that the kernel chooses: planners go by all logits
        self.arrivals = torch.zeros(len(stack), dtype=torch.int32, device=weight.device)
        self._of_one_token: RepeatedLaunch | None = None  # checked once: what differs between its calls cannot be wrong

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights [T, k] of the experts, all float32, and their ids [T, k] int64, from states [..., H]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        out = self._route_one(x) if len(x) == 1 else route_and_predict(self._call(x))
        if self.targets is not None:
            self.hear([Prediction(target, logits) for target, logits in zip(self.targets, out.logits[1:], strict=True)])
        return out.logits[0], out.topk_weights, out.topk_ids.long()

    def _call(self, x: Tensor) -> RouterCall:
        return RouterCall(x, self.weights, self.routing, self.n_guesses, self.bias)

    def _route_one(self, x: Tensor) -> Routed:
        """The launch for one token is repeated: checks and Triton's own look-up cost the host more than the launch."""
        if self._of_one_token is None:
            call = self._call(x)
            self._result_like = call.new_result()
            self._of_one_token = RepeatedLaunch(route_launch(call, self._result_like, self.arrivals))
        out = Routed(*map(torch.empty_like, self._result_like))
        tensors = {"x_ptr": x, **{f"{name}_ptr": tensor for name, tensor in out._asdict().items() if tensor.numel()}}
        self._of_one_token.run(len(self.weights), tensors)
        return out


def _stacked(biases: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    """float32 [1 + d, E] on the device of `like` [E, H], zeros where there is no bias; None where there is none at all."""
    if all(bias is None for bias in biases):
        return None
    nothing = torch.zeros(len(like), device=like.device)
    return torch.stack([nothing if bias is None else bias.detach().to(nothing) for bias in biases])
