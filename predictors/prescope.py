"""PreScope's LLaPor: one network per layer, of a shape that depends on where in the stack the layer is.

PreScope / LayerScope (arXiv 2509.23638) finds layers near the input and output to have few dominant experts and noisy states,
layers in the middle to be smoother, and gives them different networks. What the paper leaves open follows a public
reimplementation's description: features u = [PCA(h); multi-hot of this layer's top-k; the same with gate weights];

    outer layers:  W2 drop(gelu(W1 u))                                    loss: mean(q_e BCE) + mean((1 - p_t)^2 BCE)
    middle layers: v = gelu(W1 u), r = W3 drop(gelu(W2 v)), s = sigmoid(Wg PCA(h)), W4 drop(v + s * r)     loss: mean BCE

with q_e the inverse of how often expert e is used. The paper projects 4096 numbers to 256 (outer) and 512 (middle); the
defaults here suit the bundled model's 192. Its online update is `predictors/online_update.py`, off unless a threshold is set; its table
of hot experts (`predictors/hot_experts.py`, `cache.preload=hot_experts`) fills the cache before a run and is no part of prediction.

Cost: outer rank * H + width * (rank + 3 E), middle another width * (2 width + rank) parameters; 2 FLOPs each per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, gelu

from kernels.predict_mlp import MAX_WIDTH, MlpHead
from predictors.base import LayerView, ModelView, Prediction
from predictors.learned import LearnedPredictor, OneHeadPerTarget, Truth
from predictors.one_launch import MlpLaunch, OneLaunch
from predictors.online_update import OnlineUpdate
from prefetch.errors import ConfigError

GROUP_SHARE = 1 / 6  # of all layers that form the input group, and likewise the output group: 8 of 48 in the reimplementation
RAREST, LEAST_WEIGHT, GREATEST_WEIGHT = 1e-4, 0.1, 10.0  # of the balancing weights q_e


@dataclass
class PreScope(LearnedPredictor):
    """Logits of small networks over projected states and this layer's routing."""

    outer_rank: int = 48  # numbers that PCA keeps in the input and output group; at most the hidden size
    middle_rank: int = 96  # in the middle group
    width: int = 128
    dropout: float = 0.1
    input_layers: int | None = None  # observing layers in the input group; null = a sixth of all, at least 1
    output_layers: int | None = None  # in the output group
    # Learn while running when more guesses than this share are wrong (paper: 0.1); null = never.
    online_threshold: float | None = None
    online_window: int = 64  # tokens over which errors are counted
    online_learning_rate: float = 1e-4
    while_running: ClassVar[frozenset[str]] = frozenset(
        {"weights", "online_threshold", "online_window", "online_learning_rate"}
    )
    online: OnlineUpdate | None = field(default=None, init=False, repr=False)

    name = "prescope"

    def __post_init__(self) -> None:
        if self.online_threshold is not None and not 0 <= self.online_threshold <= 1:
            raise ConfigError(f"predictor.online_threshold={self.online_threshold}: it must be from 0 to 1, or null")
        if self.online_window < 1 or not self.online_learning_rate > 0:
            raise ConfigError(
                f"predictor.online_window={self.online_window} must be at least 1, and "
                f"predictor.online_learning_rate={self.online_learning_rate} above 0"
            )

    def bind(self, model: ModelView) -> None:
        """As every trained predictor; what was learned in an earlier run is forgotten."""
        if self.online is not None:
            self.network = self.online.trained
        super().bind(model)
        if self.online_threshold is not None:
            self.online = OnlineUpdate(self, self.online_threshold, self.online_window, self.online_learning_rate)

    def start_sequence(self) -> None:
        """Guesses of the last sequence are void."""
        if self.online is not None:
            self.online.start_sequence()

    def predict(self, seen: LayerView) -> list[Prediction]:
        """As every trained predictor, after learning from how the last guess for this layer turned out."""
        if self.online is None:
            return super().predict(seen)
        self.online.routed(seen)
        predictions = super().predict(seen)
        for prediction in predictions:
            self.online.predicted(seen, prediction.layer, prediction.scores)
        return predictions

    def launches(self) -> dict[int, OneLaunch]:
        """All heads, unless they learn while running or are wider than the kernel's."""
        assert isinstance(self.network, OneHeadPerTarget)
        if self.online_threshold is not None or self.width > MAX_WIDTH:
            return {}
        return {int(target): MlpLaunch(folded(head)) for target, head in self.network.heads.items()}

    def build(self) -> nn.Module:
        """One network per target layer, by the group of the layer that observes.

        Raises:
            ConfigError: the two outer groups overlap.
        """
        outer = self._outer_sources()
        return OneHeadPerTarget({target: self._head(source in outer) for target, source in self.targets().items()})

    def prepare(self, network: nn.Module, views: Sequence[LayerView]) -> None:
        """Fit every PCA, and how often each expert is used."""
        assert isinstance(network, OneHeadPerTarget)
        for target, source in self.targets().items():
            head = network.heads[str(target)]
            assert isinstance(head, OuterHead)
            head.project.fit(views[source].hidden)
            head.balance.copy_(balancing_weights(views[target].topk_ids, self.model.n_experts))

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """Mean BCE in the middle; in the outer groups expert balancing plus focal loss."""
        assert isinstance(self.network, OneHeadPerTarget)
        head, chosen = self.network.heads[str(truth.layer)], truth.chosen
        assert isinstance(head, OuterHead)
        if isinstance(head, MiddleHead):
            return binary_cross_entropy_with_logits(logits, chosen)
        bce = binary_cross_entropy_with_logits(logits, chosen, reduction="none")
        p_true = torch.exp(-bce)
        return (head.balance * bce).mean() + ((1 - p_true) ** 2 * bce).mean()

    def _outer_sources(self) -> set[int]:
        sources = sorted(self.targets().values())
        default = max(1, round(self.model.n_layers * GROUP_SHARE))
        n_input = default if self.input_layers is None else self.input_layers
        n_output = default if self.output_layers is None else self.output_layers
        given = self.input_layers is not None or self.output_layers is not None
        if n_input < 0 or n_output < 0 or (given and n_input + n_output > len(sources)):
            raise ConfigError(
                f"predictor.input_layers={n_input} and predictor.output_layers={n_output}: both must be at least 0, and together at "
                f"most the {len(sources)} layers that predict"
            )
        return set(sources[:n_input]) | set(sources[len(sources) - n_output :])

    def _head(self, outer: bool) -> nn.Module:
        rank = min(self.outer_rank if outer else self.middle_rank, self.model.hidden_size)
        make = OuterHead if outer else MiddleHead
        return make(self.model.hidden_size, rank, self.model.n_experts, self.width, self.dropout)


class Projection(nn.Module):
    """PCA: hidden [T, H] -> [T, rank], the directions in which training states vary most."""

    mean: Tensor
    directions: Tensor

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("directions", torch.zeros(hidden_size, rank))

    def fit(self, hidden: Tensor) -> None:
        """Take mean and leading eigenvectors of the covariance of `hidden` [N, H], in float64."""
        states = hidden.double()
        centred = states - states.mean(0)
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(states))  # rising eigenvalues
        self.mean.copy_(states.mean(0))
        self.directions.copy_(vectors.flip(1)[:, : self.directions.shape[1]])

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, rank]."""
        return (hidden.float() - self.mean) @ self.directions


class OuterHead(nn.Module):
    """The shallow network of the input and output group."""

    balance: Tensor  # [E], q_e of the target's experts, by which the outer groups' loss weighs

    def __init__(self, hidden_size: int, rank: int, n_experts: int, width: int, dropout: float):
        super().__init__()
        self.n_experts = n_experts
        self.register_buffer("balance", torch.ones(n_experts))
        self.project = Projection(hidden_size, rank)
        self.enter = nn.Linear(rank + 2 * n_experts, width)
        self.drop = nn.Dropout(dropout)
        self.leave = nn.Linear(width, n_experts)

    def forward(self, seen: LayerView) -> Tensor:
        """Logits [T, E]."""
        features = torch.cat([self.project(seen.hidden), *routing_features(seen, self.n_experts)], dim=1)
        logits: Tensor = self.leave(self.drop(gelu(self.enter(features))))
        return logits


class MiddleHead(OuterHead):
    """The network of the middle group: a residual block between, scaled by a gate that the projected state drives."""

    def __init__(self, hidden_size: int, rank: int, n_experts: int, width: int, dropout: float):
        super().__init__(hidden_size, rank, n_experts, width, dropout)
        self.block = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width))
        self.gate = nn.Linear(rank, width)

    def forward(self, seen: LayerView) -> Tensor:
        """Logits [T, E]."""
        projected = self.project(seen.hidden)
        v = gelu(self.enter(torch.cat([projected, *routing_features(seen, self.n_experts)], dim=1)))
        logits: Tensor = self.leave(self.drop(v + torch.sigmoid(self.gate(projected)) * self.block(v)))
        return logits


def folded(head: nn.Module) -> MlpHead:
    """The weights of `head` as the kernel reads them."""
    assert isinstance(head, OuterHead)
    outer = head.project.mean, head.project.directions, numbers(head.enter), numbers(head.leave)
    if not isinstance(head, MiddleHead):
        return MlpHead.folded(*outer)
    return MlpHead.folded(*outer, numbers(head.gate), (numbers(head.block[0]), numbers(head.block[3])))


def numbers(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach(), layer.bias.detach()


def routing_features(seen: LayerView, n_experts: int) -> tuple[Tensor, Tensor]:
    """This layer's top-k as a multi-hot vector, and with its gate weights: [T, E] float32 each."""
    empty = torch.zeros(len(seen.topk_ids), n_experts, device=seen.topk_ids.device)
    return empty.scatter(1, seen.topk_ids, 1.0), empty.scatter(1, seen.topk_ids, seen.topk_weights.float())


def balancing_weights(topk_ids: Tensor, n_experts: int) -> Tensor:
    """q [E]: mean frequency over an expert's own, clipped, mean 1; `topk_ids` [N, k] are the training tokens'."""
    frequency = torch.bincount(topk_ids.reshape(-1), minlength=n_experts) / len(topk_ids)
    weights = (frequency.mean() / frequency.clamp_min(RAREST)).clamp(LEAST_WEIGHT, GREATEST_WEIGHT)
    return weights / weights.mean()
