"""Launches of a test, recorded while they run."""

from __future__ import annotations

import pytest

from kernels.launch import Launch


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch that runs."""
    found: list[Launch] = []
    run = Launch.run

    def recorded(self: Launch) -> None:
        found.append(self)
        run(self)

    monkeypatch.setattr(Launch, "run", recorded)
    return found
