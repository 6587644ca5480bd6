"""A section in a process of its own: whatever ends it, what it had found is kept, and the others go on."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.gpu.forked import Row, Work, run_forked


def finishes(end_s: float) -> Iterator[Row]:
    yield {"n": 1, "in_time": time.monotonic() < end_s}
    yield {"n": 2}


def raises(end_s: float) -> Iterator[Row]:
    yield {"n": 1}
    raise RuntimeError("the driver is gone\nand more")


def dies(end_s: float) -> Iterator[Row]:
    yield {"n": 1}
    os.kill(os.getpid(), signal.SIGKILL)


def faults(end_s: float) -> Iterator[Row]:
    yield {"n": 1}
    faulthandler.disable()  # pytest's would write a page about it
    ctypes.string_at(0)


def leaves(end_s: float) -> Iterator[Row]:
    yield {"n": 1}
    os._exit(3)


def hangs(end_s: float) -> Iterator[Row]:
    yield {"n": 1}
    time.sleep(60)


@pytest.mark.parametrize(
    "work, reason",
    [
        (raises, "RuntimeError: the driver is gone"),
        (dies, "ended by SIGKILL"),
        (faults, "ended by SIGSEGV"),
        (leaves, "ended with status 3"),
    ],
)
def test_what_was_found_before_the_end_is_kept(work: Work, reason: str) -> None:
    rows: list[Row] = []
    assert run_forked(work, 30, rows.append) == reason
    assert rows == [{"n": 1}]


def test_one_that_finishes_says_nothing() -> None:
    rows: list[Row] = []
    assert run_forked(finishes, 30, rows.append) is None
    assert rows == [{"n": 1, "in_time": True}, {"n": 2}]


def test_one_that_hangs_is_ended_at_its_limit() -> None:
    rows: list[Row] = []
    began_s = time.monotonic()
    assert run_forked(hangs, 1, rows.append) == "ran past 1 s"
    assert rows == [{"n": 1}] and time.monotonic() - began_s < 20


def test_what_it_started_ends_with_it() -> None:
    def starts_another(end_s: float) -> Iterator[Row]:
        yield {"pid": subprocess.Popen(["sleep", "60"]).pid}
        time.sleep(60)

    rows: list[Row] = []
    run_forked(starts_another, 1, rows.append)
    for _ in range(100):
        if not alive(rows[0]["pid"]):
            return
        time.sleep(0.05)
    raise AssertionError("the process that a section started outlived it")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
