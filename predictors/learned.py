"""Predictors that are trained: one network over what the layers see, fitted to recordings, kept as a safetensors file.

A family is a dataclass of knobs with two methods: `build`, the network, and `loss`. Its network is called as
`network(seen, target)`, in training with a batch of recorded tokens, live with those of the forward pass, so that both run
the same code. `predictors/fitting.py` trains it, `predictors/weights.py` knows the file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from predictors import weights as weights_file
from predictors.base import AttentionView, LayerView, ModelView, Prediction, Predictor
from predictors.calibration import Calibration
from predictors.lookahead import check_lookahead
from predictors.one_launch import OneLaunch
from prefetch.errors import ConfigError, PredictorError


@dataclass(frozen=True)
class Truth:
    """What the target layer did with the same T tokens: what a network is trained towards."""

    layer: int
    router_logits: Tensor  # [T, E]
    topk_ids: Tensor  # [T, k] int64
    topk_weights: Tensor  # [T, k]

    @property
    def chosen(self) -> Tensor:
        """[T, E], 1 where the router selected the expert, else 0."""
        return torch.zeros_like(self.router_logits).scatter_(1, self.topk_ids, 1.0)


@dataclass
class LearnedPredictor(Predictor):
    """Base of every trained family.

    A family sets `name` and the `needs_...` of `Predictor` as it needs them, and implements `build` and `loss`; where its
    network needs statistics of the data before training, also `prepare`.
    """

    on_device = True
    lookahead: int = 1  # layers between the observation and its one target
    weights: str | None = None  # safetensors file that experiments.train wrote; null = to be trained
    while_running: ClassVar[frozenset[str]] = frozenset({"weights"})  # knobs that the weights do not depend on
    network: nn.Module | None = field(default=None, init=False, repr=False)
    calibration: Calibration | None = field(default=None, init=False, repr=False)
    one_launch: dict[int, OneLaunch] = field(default_factory=dict, init=False, repr=False)  # by target, in place of the network

    @abstractmethod
    def build(self) -> nn.Module:
        """A fresh network for `self.model`: forward(seen: LayerView, target: int) -> logits [T, E] for layer `target`."""

    @abstractmethod
    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """What training minimises, a scalar; `logits` [T, E] as the network gave them for layer `truth.layer`."""

    def logits(self, views: Sequence[LayerView]) -> dict[int, Tensor]:
        """Target layer -> logits [N, E] from what all layers saw of N tokens: what is trained, and judged while training."""
        assert self.network is not None, "fit or bind comes first"
        return {target: self.network(views[source], target) for target, source in self.targets().items()}

    def draw(self, n_rows: int, batch_rows: int, order: torch.Generator) -> list[Tensor]:
        """The batches of an epoch, each int64 [batch_rows]: every token at most once, in random order; what is left over is left out."""
        batches = torch.randperm(n_rows, generator=order).split(batch_rows)
        return [batch for batch in batches if len(batch) == batch_rows]

    def prepare(self, network: nn.Module, views: Sequence[LayerView]) -> None:
        """Take statistics from the training rows, one view per layer holding all of them, before the first step."""

    def bind(self, model: ModelView) -> None:
        """Load the weights, where they are not in memory already.

        Raises:
            ConfigError: there are neither weights in memory nor a file, or the model has too few layers for the lookahead.
            PredictorError: the file is damaged, or of another model, family or configuration.
        """
        self.use(model)
        if self.network is None:
            self._load()
        assert self.network is not None
        self.network.to(model.device)
        self.one_launch = self.launches() if model.device.type == "cuda" else {}

    def launches(self) -> dict[int, OneLaunch]:
        """Target layer -> a kernel that computes what the network does for it; the others are left to PyTorch."""
        return {}

    def use(self, model: ModelView) -> None:
        """Take the model's sizes, without weights: all that training needs.

        Raises:
            ConfigError: the model has too few layers for the lookahead.
        """
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers - 1)

    def targets(self) -> dict[int, int]:
        """Target layer -> the layer it is predicted at; no target lies past the last layer."""
        return {target: target - self.lookahead for target in range(self.lookahead, self.model.n_layers)}

    @torch.inference_mode()
    def predict(self, seen: LayerView) -> list[Prediction]:
        """Logits [T, E] float32 for layer `seen.layer + lookahead`; nothing past the last layer."""
        target = seen.layer + self.lookahead
        if target >= self.model.n_layers:
            return []
        assert self.network is not None, "bind comes first"
        launch = self.one_launch.get(target)
        return [Prediction(target, self.network(seen, target).float() if launch is None else launch(seen))]

    def probabilities(self, prediction: Prediction) -> Tensor:
        """P(used) [T, E] of every expert, by the calibration that was fitted after training.

        Raises:
            ConfigError: this predictor was not calibrated.
        """
        if self.calibration is None:
            raise ConfigError(f"predictor={self.name} is not calibrated: train it with train.calibrate=true")
        return self.calibration.probabilities(prediction.layer, prediction.scores, self.model.top_k)

    def knobs(self) -> dict[str, Any]:
        """The configuration that the weights belong to."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in self.while_running}

    def identity(self) -> dict[str, Any]:
        """What must be the same where weights are trained and where they are used."""
        knobs = {f"predictor.{knob}": value for knob, value in self.knobs().items()}
        return {"family": self.name, **knobs, **weights_file.model_identity(self.model)}

    def save(self, path: Path, trained: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
        """Write network and calibration to `path`, complete or not at all; `trained` says how they came about (plain JSON)."""
        assert self.network is not None, "fit comes first"
        tensors = {f"network.{name}": tensor.to(dtype) for name, tensor in self.network.state_dict().items()}
        if self.calibration is not None:
            tensors |= {f"calibration.{name}": tensor for name, tensor in self.calibration.tensors().items()}
        weights_file.write(path, tensors, self.identity(), trained)

    def n_parameters(self) -> int:
        """Numbers that training found, statistics such as a PCA's directions included."""
        assert self.network is not None, "bind comes first"
        return sum(tensor.numel() for tensor in self.network.state_dict().values())

    def _load(self) -> None:
        if self.weights is None:
            raise ConfigError(
                f"predictor={self.name} is trained, and predictor.weights is not set: train it with "
                f"python -m experiments.train predictor={self.name}, or name its weights"
            )
        path = weights_file.located(self.weights)
        tensors = weights_file.read(
            path, self.identity(), f"python -m experiments.train predictor={self.name} output={self.weights}"
        )
        network = self.build()
        given = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
        weights_file.check_shapes(path, given, network.state_dict())
        network.load_state_dict({name: tensor.float() for name, tensor in given.items()})
        self.network = network.eval().requires_grad_(False)
        found = {name.removeprefix("calibration."): t for name, t in tensors.items() if name.startswith("calibration.")}
        self.calibration = Calibration.from_tensors(found) if found else None


class OneHeadPerTarget(nn.Module):
    """A network made of one independent head per target layer, each called with what the observing layer saw."""

    def __init__(self, heads: Mapping[int, nn.Module]):
        super().__init__()
        self.heads = nn.ModuleDict({str(target): head for target, head in heads.items()})

    def forward(self, seen: LayerView, target: int) -> Tensor:
        """Logits [T, E]."""
        logits: Tensor = self.heads[str(target)](seen)
        return logits


def read_feature(seen: LayerView | AttentionView, name: str) -> Tensor:
    """One state of `seen` as float32 [T, H]: "hidden", "residual", "pre_attention" or "previous_final".

    Raises:
        PredictorError: it was not captured.
    """
    state: Tensor | None = getattr(seen, name)
    if state is None:
        raise PredictorError(
            f"MoE layer {seen.layer} was recorded without {name!r}, which this predictor needs; record it again"
        )
    return state.float()
