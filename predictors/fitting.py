"""Training a predictor: minibatches of recorded tokens, every target layer at once, the best weights on held-out tokens kept.

All layers are trained together, so that families may share parameters between them. For independent heads that is the same as
training each alone, since Adam treats every parameter by itself.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from predictors.base import LayerView, ModelView
from predictors.calibration import Calibration
from predictors.learned import LearnedPredictor, Truth
from prefetch.errors import PredictorError

ROWS_AT_ONCE = 4096  # tokens judged at a time
FEATURES = ("hidden", "residual", "pre_attention", "previous_final")


@dataclass
class FitOptions:
    """How to train. Defaults are those of `conf/train.yaml`."""

    epochs: int = 40  # at most
    patience: int = 6  # epochs without a better held-out recall before it ends
    batch_rows: int = 512  # tokens in a step
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    seed: int = 0
    calibrate: bool = True  # fit P(used) on the held-out tokens afterwards


@dataclass
class FitReport:
    """What training did. Recalls are recall@k on held-out tokens, mean over target layers."""

    losses: list[float] = field(default_factory=list)  # per epoch
    recalls: list[float] = field(default_factory=list)  # before the first step, then per epoch
    best_epoch: int = 0
    seconds: float = 0.0
    recall_per_target: dict[int, float] = field(default_factory=dict)  # of the weights that were kept


Report = Callable[[int, dict[str, float]], None]


def fit(
    predictor: LearnedPredictor,
    model: ModelView,
    training: Sequence[LayerView],
    held_out: Sequence[LayerView],
    options: FitOptions,
    report: Report = lambda epoch, figures: None,
) -> FitReport:
    """Train `predictor` for `model`, and leave the best network in it.

    Args:
        training, held_out: one view per MoE layer, in order, each with all N tokens; the two share no document.
        report: called after each epoch with its loss and held-out recall.

    Raises:
        PredictorError: too few tokens, a feature the family needs is missing or not finite, or the loss became NaN.
    """
    predictor.use(model)
    check_rows(predictor, training, options.batch_rows, "training")
    check_rows(predictor, held_out, 1, "held-out")
    torch.manual_seed(options.seed)
    order = torch.Generator().manual_seed(options.seed)
    network = predictor.build().train()
    with torch.no_grad():
        predictor.prepare(network, training)
    predictor.network = network
    found = FitReport()
    started = time.perf_counter()
    best, best_state = _keep_if_better(predictor, held_out, found, None, None)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    n_rows = len(training[0].token_ids)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.epochs * max(1, n_rows // options.batch_rows))
    for epoch in range(1, options.epochs + 1):
        loss = _one_epoch(predictor, training, options.batch_rows, optimiser, schedule, order)
        found.losses.append(loss)
        best, best_state = _keep_if_better(predictor, held_out, found, best, best_state)
        report(epoch, {"loss": loss, "held_out_recall": found.recalls[-1]})
        if epoch - found.best_epoch >= options.patience:
            break
    network.load_state_dict(best_state)
    network.eval().requires_grad_(False)
    found.recall_per_target = recalls(predictor, held_out)
    if options.calibrate:
        predictor.calibration = calibrate(predictor, held_out)
    found.seconds = time.perf_counter() - started
    return found


def check_rows(predictor: LearnedPredictor, views: Sequence[LayerView], least: int, what: str) -> None:
    """Raise PredictorError unless `views` can be learned from: all layers, enough tokens, every feature there and finite."""
    model = predictor.model
    if len(views) != model.n_layers:
        raise PredictorError(f"the {what} data have {len(views)} MoE layers, the model has {model.n_layers}")
    n_rows = len(views[0].token_ids)
    if n_rows < least:
        raise PredictorError(
            f"too little {what} data: {n_rows} tokens, one batch needs {least}; record more documents or lower train.batch_rows"
        )
    needed = {
        "hidden": True,
        "residual": predictor.needs_residual,
        "pre_attention": predictor.needs_pre_attention,
        "previous_final": predictor.needs_previous_final,
    }
    for view in views:
        if view.topk_ids.shape[1] != model.top_k:
            raise PredictorError(
                f"the {what} data route to {view.topk_ids.shape[1]} experts a token, the model to {model.top_k}"
            )
        for name in (feature for feature in FEATURES if needed[feature]):
            _check_feature(name, getattr(view, name), view.layer, model.hidden_size, what)


def truth_of(predictor: LearnedPredictor, view: LayerView) -> Truth:
    """What layer `view.layer` did, its router's logits computed again from what it saw."""
    logits = predictor.model.router_logits[view.layer](view.hidden).float()
    return Truth(view.layer, logits, view.topk_ids, view.topk_weights)


def rows_of(view: LayerView, rows: Tensor | slice) -> LayerView:
    """Some tokens of `view`."""
    optional = [None if t is None else t[rows] for t in (view.residual, view.pre_attention, view.previous_final)]
    return LayerView(
        view.layer, view.step, view.sequence, view.hidden[rows], optional[0],
        view.topk_ids[rows], view.topk_weights[rows], view.token_ids[rows], *optional[1:],
    )  # fmt: skip


@torch.no_grad()
def recalls(predictor: LearnedPredictor, views: Sequence[LayerView]) -> dict[int, float]:
    """Recall@k per target layer."""
    found = {}
    for target, logits in _all_logits(predictor, views).items():
        guessed = logits.topk(predictor.model.top_k, dim=1).indices
        found[target] = float((views[target].topk_ids[:, :, None] == guessed[:, None, :]).any(-1).float().mean())
    return found


@torch.no_grad()
def calibrate(predictor: LearnedPredictor, views: Sequence[LayerView], method: str = "platt") -> Calibration:
    """P(used) of `predictor`, fitted on `views`, which training must not have seen."""
    samples = {}
    for target, logits in _all_logits(predictor, views).items():
        samples[target] = logits, torch.zeros_like(logits).scatter_(1, views[target].topk_ids, 1.0)
    return Calibration.fit(samples, predictor.model.top_k, method)


def _check_feature(name: str, state: Tensor | None, layer: int, hidden_size: int, what: str) -> None:
    where = f"the {what} data of MoE layer {layer}"
    if state is None:
        raise PredictorError(
            f"{where} lack {name!r}, which this predictor needs; record them again with collect.hidden_states=true"
        )
    if state.shape[1] != hidden_size:
        raise PredictorError(f"{where}: {name} has {state.shape[1]} numbers a token, the model's hidden size is {hidden_size}")
    if not bool(state.isfinite().all()):
        raise PredictorError(f"{where}: {name} holds NaN or infinities; check the model's dtype, and record again")


def _all_logits(predictor: LearnedPredictor, views: Sequence[LayerView]) -> dict[int, Tensor]:
    """Target layer -> logits [N, E] over all tokens, a block of them at a time."""
    blocks = [slice(first, first + ROWS_AT_ONCE) for first in range(0, len(views[0].token_ids), ROWS_AT_ONCE)]
    found = [predictor.logits([rows_of(view, rows) for view in views]) for rows in blocks]
    return {target: torch.cat([part[target].float() for part in found]) for target in found[0]}


def _one_epoch(
    predictor: LearnedPredictor,
    training: Sequence[LayerView],
    batch_rows: int,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    order: torch.Generator,
) -> float:
    """The mean loss of a step and layer."""
    total, n_steps = 0.0, 0
    for batch in predictor.draw(len(training[0].token_ids), batch_rows, order):
        views = [rows_of(view, batch) for view in training]
        losses = [
            predictor.loss(found, truth_of(predictor, views[target])) for target, found in predictor.logits(views).items()
        ]
        loss = torch.stack(losses).sum()
        if not bool(loss.isfinite()):
            raise PredictorError(
                f"training predictor={predictor.name} diverged (loss {float(loss.detach())}); lower train.learning_rate"
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        total, n_steps = total + float(loss.detach()) / len(losses), n_steps + 1
    return total / n_steps


def _keep_if_better(
    predictor: LearnedPredictor,
    held_out: Sequence[LayerView],
    found: FitReport,
    best: float | None,
    state: dict[str, Tensor] | None,
) -> tuple[float, dict[str, Tensor]]:
    """Judge the network as it is; returns the best recall so far and its weights."""
    assert predictor.network is not None
    predictor.network.eval()
    per_target = recalls(predictor, held_out)
    predictor.network.train()
    recall = sum(per_target.values()) / len(per_target)
    found.recalls.append(recall)
    if best is not None and state is not None and recall <= best:
        return best, state
    found.best_epoch = len(found.recalls) - 1
    return recall, copy.deepcopy(predictor.network.state_dict())
