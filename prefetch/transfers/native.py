"""The C half of transfers, `pool.c`: compiled once with the system's C compiler, and called through ctypes.

Worker threads in Python would take the interpreter lock between any two reads, and the compute thread would wait for it
between any two operations; those of `pool.c` never do. Triton needs a C compiler at run time as well.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from ctypes import POINTER, c_double, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from prefetch.errors import BuildError

C_SOURCE = Path(__file__).with_name("pool.c")
BUILD_DIR = Path(__file__).resolve().parents[2] / ".cache" / "native"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-shared", "-fPIC", "-pthread")
READ_SHORT, READ_RAISED, GPU_ERROR = -1, -2, -1000  # as in pool.c


class NativeJob(ctypes.Structure):
    """`job` of pool.c: one transfer. Its memory must stay where it is until the job has settled."""

    _fields_ = (
        ("offset", c_int64),
        ("n_bytes", c_int64),
        ("slot_address", c_void_p),
        ("fence", c_void_p),
        ("moved_bytes", c_int64),
        ("submitted_s", c_double),
        ("started_s", c_double),
        ("finished_s", c_double),
        ("state", c_int32),
        ("demand", c_int32),
        ("error", c_int32),
        ("error_start", c_int64),
        ("n_read", c_int64),
        ("_of_the_pool", c_int64 * 6),
    )


class NativeDisk(ctypes.Structure):
    """`disk` of pool.c."""

    _fields_ = (("fd", c_int32), ("direct", c_int32))


class NativeMemory(ctypes.Structure):
    """`memory` of pool.c."""

    _fields_ = (("address", c_void_p), ("n_bytes", c_int64))


class NativeGpu(ctypes.Structure):
    """`gpu` of pool.c."""

    _fields_ = (
        ("host", NativeMemory),
        ("context", c_void_p),
        ("streams", POINTER(c_void_p)),
        ("n_streams", c_int64),
        ("_taken", c_uint64),
        ("set_context", c_void_p),
        ("wait_event", c_void_p),
        ("copy", c_void_p),
        ("synchronize", c_void_p),
    )


ReadFunction = ctypes.CFUNCTYPE(c_int32, c_void_p, POINTER(NativeJob), c_int64, c_int64, c_void_p, POINTER(c_int64))
CheckFunction = ctypes.CFUNCTYPE(c_int32, POINTER(NativeJob))


@cache
def library() -> ctypes.CDLL:
    """The compiled `pool.c`; compiling takes a second, once for each version of it.

    Raises:
        BuildError: no C compiler, or it failed.
    """
    loaded = ctypes.CDLL(str(_compiled()))
    for name, result, *arguments in (
        ("link_reserve", c_double, c_void_p, c_int64, c_double),
        ("link_deliver", None, c_void_p, c_double),
        ("read_disk", c_int32, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
        ("read_memory", c_int32, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
        ("copy_to_gpu", c_int32, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
        ("pool_bytes", c_int64, c_int32),
        ("pool_open", c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int32),
        ("pool_queued_bytes", c_void_p, c_void_p),
        ("pool_submit", None, c_void_p, c_void_p),
        ("pool_promote", None, c_void_p, c_void_p),
        ("pool_cancel", None, c_void_p, c_void_p),
        ("pool_wait_any", c_int32, c_void_p, c_void_p, c_int64, c_double),
        ("pool_close", None, c_void_p),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _compiled() -> Path:
    """The shared library of this version of the source, this machine and these flags; made if it is not there."""
    content = C_SOURCE.read_bytes()
    digest = hashlib.sha256(b"\0".join([content, platform.machine().encode(), " ".join(FLAGS).encode()])).hexdigest()
    path = BUILD_DIR / f"pool-{digest[:16]}.so"
    if path.exists():
        return path
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise BuildError("transfers need a C compiler, and neither cc, gcc nor clang is on the PATH: install one, or set CC")
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ended = subprocess.run([*compiler.split(), *FLAGS, "-o", aside, C_SOURCE], capture_output=True, text=True, check=False)
        if ended.returncode:
            raise BuildError(f"{C_SOURCE}: '{compiler}' cannot compile it: {ended.stderr.strip() or ended.returncode}")
        aside.replace(path)
    except OSError as error:
        raise BuildError(f"{C_SOURCE} cannot be compiled into {path.parent} with '{compiler}': {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def address_of(buffer: memoryview) -> int:
    """Where the bytes of a writable buffer are."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
