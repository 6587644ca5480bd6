"""How far ahead: the MoE layers a prediction may be meant for."""

from __future__ import annotations

from prefetch.errors import ConfigError


def coming_layers(layer: int, lookahead: int, n_layers: int) -> list[int]:
    """The next `lookahead` MoE layers, nearest first; after the last layer come those of the next forward pass."""
    return [(layer + d) % n_layers for d in range(1, lookahead + 1)]


def layers_ahead(source: int, target: int, n_layers: int, *, before_attention: bool = False) -> int:
    """How many layers after `source` the next run of `target` is: 1 to `n_layers`.

    Before its attention `source` itself is still to come: 0 to `n_layers - 1`.
    """
    nearest = 0 if before_attention else 1
    return (target - source - nearest) % n_layers + nearest


def check_lookahead(lookahead: int, farthest: int) -> None:
    """Raise ConfigError unless 1 <= `lookahead` <= `farthest`, the farthest distance this model and predictor allow."""
    if not 1 <= lookahead <= farthest:
        raise ConfigError(f"predictor.lookahead={lookahead}: it must be from 1 to {farthest} layers for this model")
