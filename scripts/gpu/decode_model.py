"""A decode step of a real model's size with generated weights: everything but the experts is done for real, and so costs what it costs.

Per layer: projections, attention over the KV cache (or a gated delta rule's state), norms, the router with a predictor head
in its launch, the shared expert where there is one; at the end the vocabulary. Nothing is computed that means anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from kernels.route_and_predict import route_and_predict
from kernels.router_call import RouterCall
from kernels.routing import Routing
from scripts.gpu.providers import generator
from scripts.gpu.shapes import SHAPES, MoEShape

ExpertPart = Callable[[int, Tensor, Tensor], Tensor]  # layer, hidden [1, H], routing weights [1, k] -> [1, H]


@dataclass(frozen=True)
class DecodeShape:
    """What surrounds the experts of one model; sizes from its published configuration."""

    moe: MoEShape
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int
    attention_every: int = 1  # the other layers keep a state instead (gated delta rule)
    state_heads: int = 0  # of 128 x 128 fp32 each
    gated_query: bool = False  # queries come with as many gates
    shared_intermediate: int = 0  # of the shared expert

    def attends(self, layer: int) -> bool:
        """Whether `layer` reads the KV cache."""
        return (layer + 1) % self.attention_every == 0


STATE_DIM = 128
DECODE_SHAPES = (
    DecodeShape(SHAPES[0], n_heads=32, n_kv_heads=4, head_dim=128, vocabulary=151_936),
    DecodeShape(
        SHAPES[1],
        n_heads=16,
        n_kv_heads=2,
        head_dim=256,
        vocabulary=248_320,
        attention_every=4,
        state_heads=32,
        gated_query=True,
        shared_intermediate=512,
    ),
)


class DecodeModel:
    """Generated weights of one model without its routed experts.

    Args:
        n_context: tokens in the KV cache.
    """

    def __init__(self, shape: DecodeShape, n_context: int, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.random = generator(str(device), 0)
        self.n_bytes = 0  # of weights, KV cache and states
        moe = shape.moe
        self.x = self._normal(1, moe.hidden)
        self.layers: list[Attention | DeltaRule] = [
            Attention(self, shape, n_context) if shape.attends(layer) else DeltaRule(self, shape)
            for layer in range(moe.n_layers)
        ]
        self.routers = [self._normal(2, moe.n_experts, moe.hidden) for _ in range(moe.n_layers)]  # its own, and the next one's
        self.routing = Routing(moe.top_k, renormalise=True)
        self.arrivals = torch.zeros(2, dtype=torch.int32, device=device)
        inner = shape.shared_intermediate
        self.shared = (
            [(self._weight(2 * inner, moe.hidden), self._weight(moe.hidden, inner)) for _ in self.layers] if inner else []
        )
        self.vocabulary = self._weight(shape.vocabulary, moe.hidden)

    def restart(self) -> None:
        """Forget the states of earlier tokens."""
        for mixer in self.layers:
            mixer.restart()

    def step(self, experts: ExpertPart) -> Tensor:
        """One token: logits [1, V]."""
        x = self.x
        for layer, mixer in enumerate(self.layers):
            x = x + mixer(self._norm(x))
            hidden = self._norm(x)
            x = x + experts(layer, hidden, self._routing_weights(layer, hidden))
            if self.shared:
                gate_up, down = self.shared[layer]
                gate, up = linear(hidden, gate_up).chunk(2, dim=1)
                x = x + linear(silu(gate) * up, down)
        return linear(self._norm(x), self.vocabulary)

    def rehearse(self, experts: ExpertPart) -> None:
        """The launches of a step without its dense work."""
        for layer in range(len(self.layers)):
            experts(layer, self.x, self._routing_weights(layer, self.x))

    def _routing_weights(self, layer: int, hidden: Tensor) -> Tensor:
        call = RouterCall(hidden, self.routers[layer], self.routing, self.shape.moe.top_k)
        return route_and_predict(call, arrivals=self.arrivals).topk_weights

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:])

    def _normal(self, *shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=self.dtype, device=self.device).normal_(generator=self.random)
        self.n_bytes += drawn.nbytes
        return drawn

    def _weight(self, n_out: int, n_in: int) -> Tensor:
        return self._normal(n_out, n_in).mul_(n_in**-0.5)


class Attention:
    """Grouped-query attention over a full KV cache."""

    def __init__(self, model: DecodeModel, shape: DecodeShape, n_context: int):
        hidden, width = shape.moe.hidden, shape.n_heads * shape.head_dim
        self.heads = shape.n_heads, shape.head_dim
        self.query = model._weight(width * (1 + shape.gated_query), hidden)
        self.key_value = model._weight(2 * shape.n_kv_heads * shape.head_dim, hidden)
        self.out = model._weight(hidden, width)
        self.keys, self.values = (model._normal(1, shape.n_kv_heads, n_context, shape.head_dim) for _ in range(2))

    def restart(self) -> None:
        """The cache stays full."""

    def __call__(self, x: Tensor) -> Tensor:
        query = linear(x, self.query)[:, : self.out.shape[1]].view(1, *self.heads).transpose(0, 1)[None]
        key, value = linear(x, self.key_value).view(2, 1, -1, 1, self.heads[1])
        self.keys[:, :, -1:], self.values[:, :, -1:] = key, value
        mixed = scaled_dot_product_attention(query, self.keys, self.values, enable_gqa=True)
        return linear(mixed.transpose(1, 2).reshape(1, -1), self.out)


class DeltaRule:
    """A linear-attention layer's work: its projections, and its state read and written once."""

    def __init__(self, model: DecodeModel, shape: DecodeShape):
        hidden, self.n_heads = shape.moe.hidden, shape.state_heads
        width = self.n_heads * STATE_DIM
        self.inputs = model._weight(3 * width, hidden)  # queries and keys (half as many heads each), values, gates
        self.out = model._weight(hidden, width)
        self.state = torch.zeros(self.n_heads, STATE_DIM, STATE_DIM, device=model.device)
        model.n_bytes += self.state.nbytes

    def restart(self) -> None:
        """An empty state."""
        self.state.zero_()

    def __call__(self, x: Tensor) -> Tensor:
        query_key, value, gate = linear(x, self.inputs).view(3, self.n_heads, STATE_DIM)
        key = query_key.float().unsqueeze(2)
        self.state.mul_(0.9).add_(key * value.float().unsqueeze(1), alpha=0.1)
        read = (self.state * key).sum(1).to(x.dtype)
        return linear((read * silu(gate)).view(1, -1), self.out)
