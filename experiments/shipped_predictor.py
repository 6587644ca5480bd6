"""Which predictor a run gets when none is asked for: the checkpoint's own pre-gates, where it ships them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefetch.checkpoint import Checkpoint
from prefetch.pre_gate import PreGates, read_pre_gates


def shipped_pre_gates(model_folder: Path) -> PreGates | None:
    """The pre-gates of the checkpoint in `model_folder`, if any."""
    return read_pre_gates(Checkpoint(model_folder))


def default_predictor(pre_gates: PreGates | None, overrides: Sequence[str]) -> list[str]:
    """Overrides to add to an arm's own, `overrides`: none where they, or the command line, name a predictor or set its knobs."""
    groups = {override.lstrip("+~").split("=")[0].partition(".")[0] for override in overrides}
    return [] if pre_gates is None or "predictor" in groups else ["predictor=shipped_pre_gate"]


def announcement(pre_gates: PreGates) -> str:
    """One line for the screen: what the checkpoint ships, and what that means for the run."""
    what = f"the checkpoint ships pre-gates (level {pre_gates.level}, {pre_gates.mode})"
    if pre_gates.route:
        what += ", which replace its routers: [bold]lossy[/bold], tokens are compared with the same pre-gated model"
    return f"{what}; they are the predictor of every arm that names none"
