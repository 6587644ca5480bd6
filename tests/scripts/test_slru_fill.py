"""The comparison of SLRU's two rules, on a small model."""

from __future__ import annotations

import pytest

from scripts import slru_fill


def test_filling_up_is_what_lets_a_small_cache_hit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(slru_fill, "MODELS", {"toy": (4, 16, 4)})
    monkeypatch.setattr(slru_fill, "SHARES", (0.5,))
    monkeypatch.setattr(slru_fill, "N_TOKENS", 96)
    slru_fill.main()
    names, _, figures = capsys.readouterr().out.splitlines()
    rates = dict(zip(names.split("|")[3:-1], (float(cell.strip(" %")) for cell in figures.split("|")[3:-1]), strict=True))
    assert rates[" SLRU, the original "] == 0 < rates[" SLRU, filled "]
