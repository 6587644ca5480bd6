"""A process whose transfers hang on a link of one byte a second still ends, by itself or by Ctrl-C."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefetch.geometry import PAGE_BYTES

SCRIPT = """
import os, signal, sys, threading
from prefetch.geometry import PAGE_BYTES, ExpertKey
from prefetch.memory import allocate_pages
from prefetch.transfers.link import EmulatedLink
from prefetch.transfers.sources import DiskSource
from prefetch.transfers.threads import ThreadTransfers

slots = memoryview(allocate_pages(4 * PAGE_BYTES, "a test"))
transfers = ThreadTransfers(
    DiskSource(sys.argv[1], lambda key: 0, 4 * PAGE_BYTES), lambda slot: slots,
    n_threads=2, chunk_bytes=PAGE_BYTES, link=EmulatedLink(1.0, 0.0),
)
waited = [transfers.submit(ExpertKey(0, expert), 0, demand=expert == 0) for expert in range(3)]
if sys.argv[2] == "interrupt":
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        transfers.wait_any(waited)
    finally:
        transfers.close()
        print("closed", flush=True)
"""


@pytest.mark.parametrize(("ending", "returncode", "said"), [("exit", 0, ""), ("interrupt", -signal.SIGINT, "closed\n")])
def test_process_ends_in_spite_of_transfers_under_way(tmp_path, ending, returncode, said):
    (tmp_path / "pack").write_bytes(bytes(4 * PAGE_BYTES))
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "pack", ending],
        timeout=120,
        capture_output=True,
        text=True,
        cwd=Path.cwd(),
    )
    assert ended.returncode == returncode, ended.stderr
    assert ended.stdout == said
