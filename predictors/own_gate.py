"""Own gate: a control. Gate reuse without staleness: the target's norm and router on the target's own stream, as recorded.

It must find practically all experts: where it does not, states and routing of the recording, or norm and router, do not belong
together. With `rounding=bfloat16` the stream is rounded first, which gives the *flip floor*: how far the true router agrees with
itself under the rounding of its input. No predictor of that precision can be expected above it.

The target's stream is not known while a model runs, so it can only be judged on a recording. Cost: as gate reuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from predictors.base import LayerView, ModelView
from predictors.gate_reuse import GateReuse
from prefetch.errors import ConfigError

ROUNDINGS = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
Views = Callable[[int], Iterable[LayerView]]


@dataclass
class OwnGate(GateReuse):
    """Scores are the target router's logits on the residual that reaches it."""

    rounding: str = "none"  # none | bfloat16 | float16: of the residual, before the norm
    views_of: Views | None = field(default=None, init=False, repr=False)

    name = "own_gate"
    on_device = False  # recordings are on the host

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"predictor.rounding={self.rounding}: choose one of {', '.join(ROUNDINGS)}")

    def use_states(self, views_of: Views) -> None:
        """Take what is about to be shown: sequence -> its layer views. Call it before `bind`."""
        self.views_of = views_of

    def bind(self, model: ModelView) -> None:
        """Prepare for a recording.

        Raises:
            ConfigError: there is none, as in a live run.
        """
        super().bind(model)
        if self.views_of is None:
            raise ConfigError(
                "predictor=own_gate reads states before they are computed: only a recording has them; judge it with "
                "python -m experiments.accuracy"
            )
        self.sequence: int | None = None
        self.residuals: dict[tuple[int, int], Tensor] = {}  # (step, layer) of one sequence -> [T, H]

    def stream(self, seen: LayerView, target: int) -> Tensor:
        """The residual [T, H] that will reach `target` in this forward pass."""
        if seen.sequence != self.sequence:
            assert self.views_of is not None, "bind comes first"
            self.residuals = {(v.step, v.layer): v.residual for v in self.views_of(seen.sequence) if v.residual is not None}
            self.sequence = seen.sequence
        residual, dtype = self.residuals[seen.step, target], ROUNDINGS[self.rounding]
        return residual if dtype is None else residual.to(dtype).to(residual.dtype)
