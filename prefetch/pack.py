"""Packing: rewrite a checkpoint's routed experts, once, as one row per expert in one file (`prefetch.pack_format`).

The pack grows in `<name>.partial`, whose writer holds a lock on it, and gets its name only when it is complete and on
disk. A writer that is killed leaves an unlocked partial file, which the next one overwrites; a second writer waits for
the first and then finds its work done.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kernels.quantised import QuantFormat
from prefetch.checkpoint import Checkpoint
from prefetch.errors import PackError
from prefetch.expert_tensors import load_expert
from prefetch.families import family_of, moe_geometry, moe_layer_indices
from prefetch.pack_format import PackFormat
from prefetch.progress import expert_progress

log = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PACKABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pack_format_of(checkpoint: Checkpoint, dtype: torch.dtype, how: QuantFormat | None = None) -> PackFormat:
    """The layout of the pack of `checkpoint` as `dtype`, or quantised from it where `how` says so.

    Raises:
        UnsupportedModelError: no family knows this architecture.
        PackError: `dtype` is none of float32, float16, bfloat16.
        KernelInputError: the experts' sizes do not divide into the groups of `how`.
    """
    if dtype not in PACKABLE_DTYPES:
        raise PackError(f"experts cannot be packed as {dtype}; supported: {', '.join(map(str, PACKABLE_DTYPES))}")
    return PackFormat(moe_geometry(checkpoint.config, dtype, how), checkpoint.fingerprint, checkpoint.modified_ns)


def is_pack_of(pack_path: Path, form: PackFormat) -> bool:
    """Whether `pack_path` is the pack that `form` describes, going by its header. It may be damaged or cut short.

    Raises:
        PackError: it exists and cannot be read.
    """
    try:
        with open(pack_path, "rb") as file:
            return form.header.startswith(file.read(len(form.header)))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise PackError(f"{pack_path}: cannot be read: {error.strerror}") from error


def pack_experts(
    checkpoint: Checkpoint, pack_path: Path, dtype: torch.dtype, how: QuantFormat | None = None, *, progress: bool = True
) -> None:
    """Write the routed experts of `checkpoint` to `pack_path`, converted to `dtype` or quantised, replacing what is there.

    It holds one expert in memory at a time. Another process that packs the same file is waited for, and its result
    kept. On any failure, Ctrl-C included, `pack_path` stays as it was and the partial file is removed.

    Args:
        checkpoint: where the experts come from.
        pack_path: the file to make; its folder is made if absent.
        dtype: float32, float16 or bfloat16.
        how: quantise the converted experts like this.
        progress: show a bar.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or holds NaN or Inf (also by overflow of `dtype`).
        PackError: the file cannot be written, for instance because the disk is full.
        UnsupportedModelError: no family knows this architecture.
        KernelInputError: `how` does not fit the experts' sizes or weights.
    """
    form = pack_format_of(checkpoint, dtype, how)
    partial = pack_path.with_name(pack_path.name + ".partial")
    try:
        pack_path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial) as (fd, had_to_wait):
            if had_to_wait and is_pack_of(pack_path, form):
                return
            os.ftruncate(fd, 0)
            _require_space(pack_path, form.file_bytes)
            _write_pack(fd, checkpoint, form, progress)
            os.fsync(fd)
            os.replace(partial, pack_path)
            _sync_folder(pack_path.parent)
    except OSError as error:
        space = f"; {_space(pack_path, form.file_bytes)}" if error.errno in NO_SPACE else ""
        raise PackError(f"{pack_path}: the pack cannot be written: {error.strerror}{space}") from error


def _write_pack(fd: int, checkpoint: Checkpoint, form: PackFormat, progress: bool) -> None:
    geometry, family, layers = form.geometry, family_of(checkpoint.config), moe_layer_indices(checkpoint.config)
    row = torch.zeros(geometry.expert.row_bytes, dtype=torch.uint8)
    checksums = np.empty((geometry.n_layers, geometry.n_experts), dtype="<u4")
    _write_all(fd, form.header)
    with expert_progress("packing experts", geometry, progress) as advance:
        for layer in range(geometry.n_layers):
            for expert in range(geometry.n_experts):
                geometry.expert.fill(row, partial(load_expert, checkpoint, family, layers[layer], expert))
                checksums[layer, expert] = zlib.crc32(row.numpy().data)
                _write_all(fd, row.numpy().data)
                advance()
    _write_all(fd, checksums.tobytes())


@contextmanager
def _locked(partial: Path) -> Iterator[tuple[int, bool]]:
    """A descriptor of `partial` that only one process has at a time, and whether another had it first.

    On leaving, the file is removed unless it has been renamed. The kernel drops the lock of a killed process.
    """
    had_to_wait = False
    while True:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            had_to_wait |= _lock(fd, partial)
            if _is_named(fd, partial):
                try:
                    yield fd, had_to_wait
                finally:
                    if _is_named(fd, partial):
                        partial.unlink()
                return
        finally:
            os.close(fd)


def _lock(fd: int, partial: Path) -> bool:
    """Lock the file; returns whether somebody else had it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        log.warning("%s: another process is packing these experts; waiting for it", partial)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return True


def _is_named(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file: its last owner may have renamed or removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _write_all(fd: int, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while len(rest):
        rest = rest[os.write(fd, rest) :]


def _require_space(pack_path: Path, needed: int) -> None:
    if shutil.disk_usage(pack_path.parent).free < needed:
        raise PackError(f"{pack_path}: not enough disk space; {_space(pack_path, needed)}")


def _space(pack_path: Path, needed: int) -> str:
    free = shutil.disk_usage(pack_path.parent).free
    return f"the pack needs {needed} bytes ({needed / 1e9:.2f} GB), the disk has {free} free ({free / 1e9:.2f} GB)"


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
