"""What arms share is opened once and closed whatever happens, and measuring the link stays small beside the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from experiments import backend, link_rate
from prefetch.errors import TransferError
from prefetch.geometry import ExpertGeometry, MoEGeometry


def tier(kind: str, n_threads: int) -> DictConfig:
    return OmegaConf.create({"tier": {"kind": kind, "n_threads": n_threads}, "backend": {"kind": "cuda"}})


def test_each_kind_of_tier_is_opened_once_for_the_most_threads_and_all_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    closed: list[str] = []

    def build(cfg: DictConfig, store: Any, n_threads: int) -> SimpleNamespace:
        opened.append((cfg.tier.kind, n_threads))

        def close() -> None:
            closed.append(cfg.tier.kind)
            raise TransferError("no more")

        return SimpleNamespace(close=close)

    monkeypatch.setattr(backend, "build_source", build)
    with pytest.raises(TransferError), backend.BackingTiers(SimpleNamespace(), 3) as tiers:  # type: ignore[arg-type]
        assert tiers.of(tier("host", 1)) is tiers.of(tier("host", 3))
        tiers.of(tier("disk", 1))
    assert opened == [("host", 3), ("disk", 3)] and sorted(closed) == ["disk", "host"]


@pytest.mark.parametrize(("intermediate", "n_buffers"), [(32, 64), (48 * 1024, 3), (4096, 42)])
def test_buffers_for_the_links_rate_are_bounded_in_bytes(
    intermediate: int, n_buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    class NoPool:
        def __init__(self, geometry: MoEGeometry, n_slots: int, device: torch.device):
            made.append(n_slots)

        def address(self, slot: int) -> int:
            assert slot < made[0]
            return slot

    monkeypatch.setattr(link_rate, "SlotPool", NoPool)
    size = MoEGeometry(2, 8, 2, ExpertGeometry(1024, intermediate, torch.bfloat16))
    nothing: Any = SimpleNamespace(read_to=lambda *place: None)
    link_rate.measured_bytes_per_s(nothing, size, n_threads=3)
    assert made == [n_buffers]
