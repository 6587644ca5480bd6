"""How a router turns logits into experts and weights: the options of the models in use, and the rule in PyTorch.

    score  = softmax(logits) or sigmoid(logits)
    choice = score + selection_bias, -inf outside the best groups
    ids    = the k highest of choice;  weights = score[ids] (/ their sum) * scaling_factor

Qwen3-MoE, OLMoE, DeepSeek-V2-Lite: softmax. Mixtral: softmax, renormalised; gpt-oss: the same function, with a bias on the logits.
DeepSeek-V2: groups by their best expert. DeepSeek-V3, GLM-4.5, Kimi: sigmoid, selection bias, groups by the sum of their two best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.launch import check_at_most
from kernels.selection import highest_reference
from prefetch.errors import KernelInputError

Score = Literal["softmax", "sigmoid"]
GroupScore = Literal["best", "two_best"]
SMALLEST_SUM = 1e-20  # keeps 0 / 0 out of the renormalisation; as DeepSeek-V3


@dataclass(frozen=True)
class Routing:
    """The options.

    Raises:
        KernelInputError: an option that does not exist.
    """

    top_k: int
    score: Score = "softmax"
    renormalise: bool = False  # weights sum to `scaling_factor`
    scaling_factor: float = 1.0
    n_groups: int = 1  # the experts in order, split into groups of one size
    n_kept_groups: int = 1  # of these alone experts are selected
    group_score: GroupScore = "two_best"

    def __post_init__(self) -> None:
        for name, allowed in (("score", get_args(Score)), ("group_score", get_args(GroupScore))):
            if getattr(self, name) not in allowed:
                raise KernelInputError(f"Routing.{name} = {getattr(self, name)!r} must be one of {', '.join(allowed)}")
        check_at_most("Routing.n_kept_groups", self.n_kept_groups, "n_groups", self.n_groups)

    @property
    def grouped(self) -> bool:
        return self.n_kept_groups < self.n_groups

    def chooses_by_logit(self, has_selection_bias: bool) -> bool:
        """Whether the choice may compare logits: their order is that of the scores, but they never underflow into ties."""
        return not has_selection_bias and not (self.grouped and self.group_score == "two_best")

    def check(self, n_experts: int) -> None:
        """Raises:
        KernelInputError: these options do not fit `n_experts` experts.
        """
        if self.n_groups < 1 or n_experts % self.n_groups:
            raise KernelInputError(f"Routing.n_groups = {self.n_groups} must divide the {n_experts} experts")
        group_size = n_experts // self.n_groups
        check_at_most("Routing.top_k", self.top_k, "experts in the kept groups", self.n_kept_groups * group_size)
        if self.grouped and self.group_score == "two_best" and group_size == 1:
            raise KernelInputError("Routing.group_score = 'two_best' needs groups of at least 2 experts; use 'best'")


def route_reference(logits: Tensor, routing: Routing, selection_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rule in PyTorch, in the dtype of `logits`.

    Args:
        logits: [T, E] float32 or float64.
        selection_bias: [E], added to the scores for the choice alone.

    Returns:
        ids int64 [T, k], best first, ties to the lower id, NaN like -inf; weights [T, k]. A row with a NaN logit has NaN weights
        (under "sigmoid" only where a chosen logit is NaN, or renormalised with one that is).
    """
    ids = highest_reference(choice_scores(logits, routing, selection_bias), routing.top_k)
    weights = _scores(logits, routing).gather(1, ids)
    if routing.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + SMALLEST_SUM)
    return ids, weights * routing.scaling_factor


def choice_scores(logits: Tensor, routing: Routing, selection_bias: Tensor | None = None) -> Tensor:
    """What the rule takes the k highest of, [T, E] in the dtype of `logits`; arguments as for `route_reference`."""
    choice = logits if routing.chooses_by_logit(selection_bias is not None) else _scores(logits, routing)
    if selection_bias is not None:
        choice = choice + selection_bias.to(choice.dtype)
    return _only_best_groups(choice, routing) if routing.grouped else choice


def _scores(logits: Tensor, routing: Routing) -> Tensor:
    return logits.softmax(-1) if routing.score == "softmax" else logits.sigmoid()


def _only_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    choice = torch.where(choice.isnan(), -torch.inf, choice)
    groups = choice.view(len(choice), routing.n_groups, -1)
    group_scores = groups.topk(1 if routing.group_score == "best" else 2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, highest_reference(group_scores, routing.n_kept_groups), True)
    return groups.masked_fill(~kept[..., None], -torch.inf).view_as(choice)
