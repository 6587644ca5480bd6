"""What a machine is to a replay: a link and costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from prefetch.costs import Costs
from prefetch.errors import ConfigError
from prefetch.geometry import MoEGeometry


@dataclass(frozen=True)
class Link:
    """A serial link between the backing tier and the fast tier; each chunk occupies it for its latency and its bytes."""

    bytes_per_s: float
    latency_s: float = 0.0
    chunk_bytes: int = 1 << 20  # the most that a demand load waits for

    def load_s(self, n_bytes: int) -> float:
        """How long moving an expert of `n_bytes` occupies it."""
        return -(-n_bytes // self.chunk_bytes) * self.latency_s + n_bytes / self.bytes_per_s


class Machine(ABC):
    """Base of all machines. One file and one YAML each."""

    link: Any  # {bytes_per_s, latency_s, chunk_bytes}

    def the_link(self) -> Link:
        """What experts are moved over.

        Raises:
            ConfigError: `machine.link` is none.
        """
        return link_of(self.link)

    @abstractmethod
    def costs(self, geometry: MoEGeometry, dense_bytes: float | None, arm: str | None) -> Costs:
        """What computing takes.

        Args:
            geometry: the model's experts.
            dense_bytes: what else a forward pass reads, per MoE layer: attention, KV cache, routers, output head; None: not known.
            arm: name of the arm that is replayed; None where it predicts nothing.

        Raises:
            ConfigError, ResultsError: it cannot be told.
        """


def link_of(knobs: Mapping[str, Any] | None) -> Link:
    """The link that `machine.link` describes.

    Raises:
        ConfigError: it is none.
    """
    known = [f.name for f in fields(Link)]
    if not isinstance(knobs, Mapping) or "bytes_per_s" not in knobs or not set(knobs) <= set(known):
        raise ConfigError(f"machine.link={knobs}: it must have bytes_per_s, and may have latency_s and chunk_bytes")
    if not all(isinstance(value, int | float) for value in knobs.values()):
        raise ConfigError(f"machine.link={dict(knobs)}: all of it must be plain numbers")
    return Link(**knobs)


def at_least(option: str, value: float, least: float) -> float:
    """`value`, unless it is too small.

    Raises:
        ConfigError: naming the option.
    """
    if not value >= least:
        raise ConfigError(f"machine.{option}={value}: it must be at least {least:g}")
    return value
