"""Quasi-hidden: gate reuse on the residual plus what this layer's experts will add on average.

The router's choice is known before its experts have run. Each expert is stood in for by its mean output over a calibration text, its
*default vector* v (Speculating Experts, arXiv 2603.19289), so that the state the target reads is less stale:

    logits = router_{N+d}(norm_{N+d}(residual_N + sum_i w_i v_N(e_i)))        (e_i, w_i): the k experts and weights at layer N

Nothing is trained: `python -m experiments.default_vectors` measures v once per model. Where d > 1, what the layers between will add
stays unknown. Cost: L * E * H numbers; per token 2 * k * H + 2 * H * E FLOPs and one norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.expert_form import PLAIN, ExpertForm
from predictors import weights as weights_file
from predictors.base import LayerView, ModelView
from predictors.gate_reuse import GateReuse
from prefetch.errors import ConfigError
from prefetch.geometry import ExpertKey

ROWS_AT_ONCE = 4096  # tokens through one expert at a time: bounds memory


@dataclass
class QuasiHidden(GateReuse):
    """Scores are the target router's logits on the quasi-hidden state."""

    weights: str | None = None  # safetensors file that experiments.default_vectors wrote
    vectors: Tensor | None = field(default=None, init=False, repr=False)  # [L, E, H] float32

    name = "quasi_hidden"

    def bind(self, model: ModelView) -> None:
        """Load the default vectors, where they are not in memory already.

        Raises:
            ConfigError: there is no file named.
            PredictorError: the file is missing, damaged, or of another model.
        """
        super().bind(model)
        if self.vectors is None:
            self.vectors = self._load()
        self.vectors = self.vectors.to(model.device)

    def stream(self, seen: LayerView, target: int) -> Tensor:
        """residual + gate-weighted default vectors, [T, H]."""
        assert seen.residual is not None, "needs_residual is set: the runtime must capture the residual"
        assert self.vectors is not None, "bind comes first"
        vectors = self.vectors[seen.layer][seen.topk_ids]  # [T, k, H]
        added = (seen.topk_weights.to(vectors.dtype).unsqueeze(1) @ vectors).squeeze(1)
        return seen.residual + added.to(seen.residual.dtype)

    def n_parameters(self) -> int:
        """Numbers in the default vectors."""
        assert self.vectors is not None, "bind comes first"
        return self.vectors.numel()

    def _load(self) -> Tensor:
        if self.weights is None:
            raise ConfigError(
                "predictor=quasi_hidden needs default vectors: measure them with python -m experiments.default_vectors, and name "
                "the file in predictor.weights"
            )
        path, model = weights_file.located(self.weights), self.model
        tensors = weights_file.read(path, identity(model), f"python -m experiments.default_vectors output={self.weights}")
        expected = {"vectors": torch.empty(model.n_layers, model.n_experts, model.hidden_size, device="meta")}
        weights_file.check_shapes(path, tensors, expected)
        return tensors["vectors"].float()


def default_vectors(
    views: Sequence[LayerView],
    n_experts: int,
    read_expert: Callable[[ExpertKey], tuple[Tensor, Tensor]],
    advance: Callable[[], None],
    forms: Sequence[ExpertForm] | None = None,
) -> Tensor:
    """Mean output of every expert over the tokens that were routed to it, [L, E, H] float32; 0 for one that was never used.

    Args:
        views: per MoE layer what it saw of the calibration text.
        read_expert: (gate_up [2I, H], down [H, I]) of an expert.
        advance: called after each of the L * E experts.
        forms: of each layer's experts; None: SwiGLU without biases.
    """
    means = torch.zeros(len(views), n_experts, views[0].hidden.shape[1])
    for view in views:
        form = PLAIN if forms is None else forms[view.layer]
        for expert in range(n_experts):
            rows = (view.topk_ids == expert).any(dim=1).nonzero().flatten()
            if len(rows):
                gate_up, down = read_expert(ExpertKey(view.layer, expert))
                blocks = [form.mlp(expert, view.hidden[block], gate_up, down).float() for block in rows.split(ROWS_AT_ONCE)]
                means[view.layer, expert] = torch.stack([block.sum(dim=0) for block in blocks]).sum(dim=0) / len(rows)
            advance()
    return means


def save(
    path: Path, vectors: Tensor, model: ModelView, measured: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write `vectors` [L, E, H] to `path`, complete or not at all; `measured` says how they came about (plain JSON)."""
    weights_file.write(path, {"vectors": vectors.to(dtype)}, identity(model), measured)


def identity(model: ModelView) -> dict[str, Any]:
    """What must be the same where the vectors are measured and where they are used."""
    return {"family": QuasiHidden.name, **weights_file.model_identity(model)}
