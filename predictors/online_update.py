"""Learning while decoding: one training step whenever the error over a window of tokens passes a threshold.

PreScope (arXiv 2509.23638) updates its networks so, with a window of 64 tokens and a threshold of 10 %, at 1.8 ms an update. Error
is the share of the router's experts that were not among the k best guesses. After an update the window begins anew, so that there
is at most one update per window and target layer. Cost: one forward and backward pass of one head over the window.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from predictors.base import LayerView, stable_top
from predictors.fitting import rows_of, truth_of
from predictors.learned import LearnedPredictor

STATES = ("hidden", "residual", "topk_ids", "topk_weights", "token_ids", "pre_attention")


@dataclass
class Window:
    """The latest tokens of one target layer: what was seen when it was predicted, what it then saw, how wrong the guess was."""

    sources: list[LayerView] = field(default_factory=list)
    targets: list[LayerView] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)  # [T] each

    @property
    def n_tokens(self) -> int:
        return sum(len(error) for error in self.errors)


class OnlineUpdate:
    """Replaces the network of `predictor` by a copy that learns, as long as the predictor is shown what its layers see.

    Args:
        predictor: bound; its trained network stays as it is, in `trained`.
        threshold: share of wrong guesses over the window above which a step is made.
        window: tokens.
        learning_rate: of Adam.
    """

    def __init__(self, predictor: LearnedPredictor, threshold: float, window: int, learning_rate: float):
        assert predictor.network is not None
        self.predictor, self.threshold, self.window = predictor, threshold, window
        self.trained = predictor.network
        self.network = predictor.network = copy.deepcopy(self.trained).requires_grad_(True)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=learning_rate)
        self.windows = {target: Window() for target in predictor.targets()}
        self.guessed: dict[int, tuple[LayerView, Tensor]] = {}  # target layer of this forward pass -> (source, scores)
        self.n_updates = 0

    def start_sequence(self) -> None:
        """Guesses of the last sequence are void; what was learned stays."""
        self.guessed.clear()

    def predicted(self, seen: LayerView, target: int, scores: Tensor) -> None:
        """`scores` [T, E] were given for layer `target`."""
        self.guessed[target] = seen, scores

    def routed(self, seen: LayerView) -> None:
        """Layer `seen.layer` has routed: judge the guess for it, and learn if the window is full and too often wrong."""
        source, scores = self.guessed.pop(seen.layer, (None, None))
        if source is None or scores is None:
            return
        best = stable_top(scores, seen.topk_ids.shape[1])
        right = (seen.topk_ids[:, :, None] == best[:, None, :]).any(-1).float().mean(1)
        window = self.windows[seen.layer]
        window.sources.append(source)
        window.targets.append(seen)
        window.errors.append(1 - right)
        if window.n_tokens >= self.window:
            if float(torch.cat(window.errors)[-self.window :].mean()) > self.threshold:
                self._learn(seen.layer, window)
            self.windows[seen.layer] = Window()

    def _learn(self, target: int, window: Window) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            source, seen = _last_rows(window.sources, self.window), _last_rows(window.targets, self.window)
            loss = self.predictor.loss(self.network(source, target), truth_of(self.predictor, seen))
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
        self.n_updates += 1


def _last_rows(views: Sequence[LayerView], n: int) -> LayerView:
    """The last `n` tokens of `views` as one view; made outside inference mode, so that training may use it."""
    states: dict[str, Any] = {name: _joined([getattr(view, name) for view in views]) for name in STATES}
    first = views[0]
    return rows_of(LayerView(first.layer, first.step, first.sequence, **states), slice(-n, None))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    captured = [part for part in parts if part is not None]
    return torch.cat(captured) if captured else None
