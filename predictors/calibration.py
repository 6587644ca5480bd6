"""From scores to probabilities: P(expert is used), fitted per target layer on recorded routing.

Scores of different families, and of different tokens, have no common scale. What they share is the boundary between the k-th
and the (k+1)-th best, so a score is first read as its distance from there, its *margin*. Platt scaling (1999) then fits
sigmoid(a * margin + b); isotonic regression (pool adjacent violators) any rising step function. Cost: one sort of E scores and
2 * E FLOPs a token and layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prefetch.errors import ConfigError, PredictorError

METHODS = ("platt", "isotonic")
NEWTON_STEPS = 50
KNOTS = 64  # of an isotonic curve, per layer
LEAST_ROWS = 16  # tokens per layer below which a curve would describe noise


@dataclass(frozen=True)
class Reliability:
    """Predicted probability against observed frequency, over equal-width bins of probability."""

    predicted: Tensor  # [bins] mean probability of the bin; NaN where it is empty
    observed: Tensor  # [bins] share of its experts that were used
    count: Tensor  # [bins] int64

    @property
    def expected_calibration_error(self) -> float:
        """Mean of |observed - predicted| over all (token, expert), Naeini et al. 2015."""
        gap = (self.observed - self.predicted).abs().nan_to_num(0.0)
        return float((gap * self.count).sum() / self.count.sum().clamp_min(1))


@dataclass(frozen=True)
class Calibration:
    """Curves per target layer: piecewise linear in the margin (isotonic), or a sigmoid (Platt)."""

    curves: Mapping[int, Tensor]  # target layer -> [2] (a, b) of Platt, or [2, KNOTS] (margins, probabilities)

    @classmethod
    def fit(cls, samples: Mapping[int, tuple[Tensor, Tensor]], top_k: int, method: str = "platt") -> Calibration:
        """Fit on `samples`: target layer -> (scores [T, E], chosen [T, E] 0/1).

        Raises:
            ConfigError: an unknown method.
            PredictorError: too few tokens, or scores that are NaN.
        """
        if method not in METHODS:
            raise ConfigError(f"calibration method {method!r}: choose one of {', '.join(METHODS)}")
        curves = {}
        for target, (scores, chosen) in samples.items():
            if len(scores) < LEAST_ROWS:
                raise PredictorError(
                    f"calibrating layer {target} needs at least {LEAST_ROWS} tokens, there are {len(scores)}: record more"
                )
            if bool(scores.isnan().any()):
                raise PredictorError(f"calibrating layer {target}: scores hold NaN")
            possible = ~scores.isneginf()
            margin, used = margins(scores, top_k)[possible].double(), chosen[possible].double()
            curves[target] = platt(margin, used) if method == "platt" else isotonic(margin, used)
        return cls(curves)

    def probabilities(self, target: int, scores: Tensor, top_k: int) -> Tensor:
        """P(used) [T, E] float32 from scores [T, E] for layer `target`; 0 where a score says never.

        Raises:
            PredictorError: that layer was not calibrated.
        """
        if target not in self.curves:
            raise PredictorError(f"layer {target} was not calibrated; calibrated are {sorted(self.curves)}")
        margin, curve = margins(scores, top_k), self.curves[target].to(scores.device)
        found = torch.sigmoid(curve[0] * margin + curve[1]) if curve.ndim == 1 else _interpolate(margin, *curve)
        return found.masked_fill(scores.isneginf(), 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """The curves by name, float32."""
        return {str(target): curve for target, curve in self.curves.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Calibration:
        """What `tensors` described."""
        return cls({int(name): tensor.float() for name, tensor in tensors.items()})


def margins(scores: Tensor, top_k: int) -> Tensor:
    """Distance [T, E] of each score from the middle between its row's k-th and (k+1)-th best.

    Rows with fewer finite scores take the least finite one as boundary, and an expert that is never predicted has no margin
    (-inf).
    """
    best = scores.topk(min(top_k + 1, scores.shape[1]), dim=1).values
    least = scores.masked_fill(scores.isneginf(), torch.inf).amin(1, keepdim=True)
    best = best.maximum(least)
    return scores - (best[:, -1:] + best[:, min(top_k, best.shape[1]) - 1, None]) / 2


def platt(margin: Tensor, used: Tensor) -> Tensor:
    """(a, b) float32 that maximise the likelihood of `used` [N] under sigmoid(a * margin + b), by damped Newton steps.

    Targets are (n+ + 1) / (n+ + 2) and 1 / (n- + 2) instead of 1 and 0, as in Platt's paper, so that separable data stay finite.
    """
    n_used = used.sum()
    n_unused = len(used) - n_used
    target = torch.where(used > 0, (n_used + 1) / (n_used + 2), 1 / (n_unused + 2))
    scale = margin.std().clamp_min(1e-12) if len(margin) > 1 else margin.new_tensor(1.0)
    x = torch.stack([margin / scale, torch.ones_like(margin)])
    w = margin.new_zeros(2)
    loss = _logistic_loss(w, x, target)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(w @ x)
        gradient = x @ (p - target)
        hessian = (x * (p * (1 - p))) @ x.T + 1e-9 * len(margin) * torch.eye(2, dtype=x.dtype)
        step = torch.linalg.solve(hessian, gradient)
        while (tried := _logistic_loss(w - step, x, target)) > loss and float(step.abs().max()) > 1e-9:
            step = step / 2
        w, done = w - step, float(step.abs().max()) < 1e-9
        loss = tried
        if done:
            break
    return torch.stack([w[0] / scale, w[1]]).float()


def isotonic(margin: Tensor, used: Tensor) -> Tensor:
    """[2, KNOTS] float32: margins and the rising probabilities at them that fit `used` [N] best in squared error.

    Margins are first pooled into equally filled bins, whose means pool-adjacent-violators then makes monotone.
    """
    order = margin.argsort()
    bins = torch.tensor_split(torch.stack([margin[order], used[order]]), min(KNOTS, len(margin)), dim=1)
    blocks: list[tuple[float, int, int]] = []  # mean, weight, bins pooled
    for piece in bins:
        block = float(piece[1].mean()), piece.shape[1], 1
        while blocks and blocks[-1][0] >= block[0]:
            mean, weight, n = blocks.pop()
            total = weight + block[1]
            block = (mean * weight + block[0] * block[1]) / total, total, n + block[2]
        blocks.append(block)
    heights = [mean for mean, _, n in blocks for _ in range(n)]
    knots = torch.tensor([[float(piece[0].mean()) for piece in bins], heights])
    return knots if knots.shape[1] == KNOTS else torch.cat([knots, knots[:, -1:].expand(2, KNOTS - knots.shape[1])], dim=1)


def reliability(probabilities: Tensor, used: Tensor, n_bins: int = 10) -> Reliability:
    """Bin `probabilities` (any shape, 0..1) and compare with `used` (same shape, 0/1)."""
    p, u = probabilities.reshape(-1).double(), used.reshape(-1).double()
    index = (p * n_bins).long().clamp(0, n_bins - 1)
    count = torch.bincount(index, minlength=n_bins)
    predicted, observed = (torch.bincount(index, values, minlength=n_bins) / count for values in (p, u))
    return Reliability(predicted, observed, count)


def _logistic_loss(w: Tensor, x: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(w @ x, target, reduction="sum")


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear through (x, y), rising x [n]; constant beyond the ends."""
    right = torch.searchsorted(x.contiguous(), at.contiguous()).clamp(1, len(x) - 1)
    x0, x1, y0, y1 = x[right - 1], x[right], y[right - 1], y[right]
    share = ((at - x0) / (x1 - x0).clamp_min(1e-12)).clamp(0.0, 1.0)
    return y0 + share * (y1 - y0)
