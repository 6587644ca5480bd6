"""Backing tiers: the right bytes, clear errors, nothing left open."""

import ctypes
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from prefetch.errors import TransferError
from prefetch.geometry import PAGE_BYTES, ExpertKey
from prefetch.transfers import sources
from prefetch.transfers.sources import DiskSource, HostSource
from tests.prefetch.transfers.gated_source import row_of

ROW_BYTES = 6 * PAGE_BYTES
N_EXPERTS = 8
KEYS = [ExpertKey(layer, expert) for layer in range(3) for expert in range(N_EXPERTS)]


def offset_of(key: ExpertKey) -> int:
    return PAGE_BYTES + (key[0] * N_EXPERTS + key[1]) * ROW_BYTES


def new_buffer(n_bytes: int = ROW_BYTES) -> memoryview:
    return memoryview(mmap.mmap(-1, n_bytes))


def open_files() -> list[str]:
    """Targets of this process's file descriptors."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.islink(link)]


@pytest.fixture
def pack(tmp_path) -> Path:
    path = tmp_path / "experts.pack"
    path.write_bytes(bytes(PAGE_BYTES) + b"".join(row_of(key, ROW_BYTES) for key in KEYS))
    return path


both_tiers = pytest.mark.parametrize("tier", [DiskSource, HostSource])


@both_tiers
def test_rows_and_parts_of_rows_equal_the_file(tier, pack):
    source = tier(pack, offset_of, ROW_BYTES)
    for key in KEYS:
        buffer = new_buffer()
        source.read_into(key, 0, buffer)
        assert buffer == row_of(key, ROW_BYTES)
        part = new_buffer(2 * PAGE_BYTES)
        source.read_into(key, 3 * PAGE_BYTES, part)
        assert part == row_of(key, ROW_BYTES)[3 * PAGE_BYTES : 5 * PAGE_BYTES]
        assert source.row(key) == row_of(key, ROW_BYTES)
    source.close()


@both_tiers
def test_threads_may_read_at_once(tier, pack):
    source = tier(pack, offset_of, ROW_BYTES)
    wrong = []

    def read_all(first: int) -> None:
        buffer = new_buffer()
        for key in KEYS[first:] + KEYS[:first]:
            source.read_into(key, 0, buffer)
            if buffer != row_of(key, ROW_BYTES):
                wrong.append(key)

    threads = [threading.Thread(target=read_all, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    source.close()


@both_tiers
@pytest.mark.parametrize("kept", [0, 100, 4 * PAGE_BYTES, 4 * PAGE_BYTES + 100])
def test_truncated_file_names_file_expert_offset_and_sizes(tier, pack, kept):
    key = KEYS[-1]
    os.truncate(pack, offset_of(key) + kept)
    source = tier(pack, offset_of, ROW_BYTES)
    source.read_into(KEYS[0], 0, new_buffer())
    with pytest.raises(TransferError) as raised:
        source.read_into(key, 0, new_buffer())
    for part in (str(pack), "layer 2 expert 7", f"offset {offset_of(key)}", f"{kept} of {ROW_BYTES} bytes"):
        assert part in str(raised.value)
    with pytest.raises(TransferError, match=f"{kept} of {ROW_BYTES} bytes"):
        source.row(key)
    source.close()


def test_file_truncated_while_open(pack):
    source = DiskSource(pack, offset_of, ROW_BYTES)
    os.truncate(pack, offset_of(KEYS[5]) + PAGE_BYTES)
    with pytest.raises(TransferError, match=f"{PAGE_BYTES} of {ROW_BYTES} bytes"):
        source.read_into(KEYS[5], 0, new_buffer())
    source.close()


@both_tiers
def test_missing_file_is_named(tier, tmp_path):
    with pytest.raises(TransferError, match=r"absent\.pack"):
        tier(tmp_path / "absent.pack", offset_of, ROW_BYTES)


def test_empty_file_is_refused_by_the_host_tier(tmp_path):
    (tmp_path / "empty.pack").touch()
    with pytest.raises(TransferError, match="empty"):
        HostSource(tmp_path / "empty.pack", offset_of, ROW_BYTES)


def test_no_direct_reads_is_reported_and_a_device_error_surfaces(caplog):
    """/proc/self/mem is a file that has no O_DIRECT, holds known bytes, and answers EIO for addresses nobody has."""
    row = row_of(KEYS[1], ROW_BYTES)
    known = ctypes.create_string_buffer(row, ROW_BYTES)
    offsets = {KEYS[0]: 0, KEYS[1]: ctypes.addressof(known)}
    source = DiskSource("/proc/self/mem", offsets.__getitem__, ROW_BYTES)
    assert not source.direct
    assert "O_DIRECT" in caplog.text and "/proc/self/mem" in caplog.text
    buffer = new_buffer()
    source.read_into(KEYS[1], 0, buffer)
    assert buffer == row
    with pytest.raises(TransferError, match="layer 0 expert 0 at offset 0: Input/output error"):
        source.read_into(KEYS[0], 0, buffer)
    source.close()


def test_direct_reads_leave_the_page_cache_alone(pack, caplog):
    """mincore, through a mapping of the file, tells which of its pages the kernel holds."""
    source = DiskSource(pack, offset_of, ROW_BYTES)
    if not source.direct:
        assert "O_DIRECT" in caplog.text
        return
    with open(pack, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for key in KEYS:
        source.read_into(key, 0, new_buffer())
    mapped = np.memmap(pack, dtype=np.uint8, mode="r")
    resident = (ctypes.c_ubyte * (mapped.size // PAGE_BYTES))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size), resident) == 0
    assert sum(page & 1 for page in resident) < len(resident) // 2
    source.close()


@both_tiers
def test_close_releases_the_file_and_refuses_later_reads(tier, pack):
    source = tier(pack, offset_of, ROW_BYTES)
    source.close()
    source.close()
    assert str(pack) not in open_files()
    with pytest.raises(TransferError, match=r"experts\.pack"):
        source.read_into(KEYS[0], 0, new_buffer())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_closing_the_host_tier_gives_its_memory_back(tmp_path):
    n_bytes = 64 << 20
    (tmp_path / "large.pack").touch()
    os.truncate(tmp_path / "large.pack", n_bytes)
    source = HostSource(tmp_path / "large.pack", offset_of, ROW_BYTES)
    before = resident_bytes()
    source.close()
    assert before - resident_bytes() > n_bytes // 2


def test_host_tier_needs_the_file_only_once(pack):
    source = HostSource(pack, offset_of, ROW_BYTES)
    assert str(pack) not in open_files()
    pack.unlink()
    buffer = new_buffer()
    source.read_into(KEYS[3], 0, buffer)
    assert buffer == row_of(KEYS[3], ROW_BYTES)
    source.close()


def test_a_long_load_shows_its_progress(pack, monkeypatch, capsys):
    HostSource(pack, offset_of, ROW_BYTES).close()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sources, "QUIET_S", 0.0)
    HostSource(pack, offset_of, ROW_BYTES).close()
    assert "loading experts into RAM" in capsys.readouterr().err
