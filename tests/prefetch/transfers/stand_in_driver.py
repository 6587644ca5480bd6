"""Compiles the stand-in for the CUDA driver, and lets a test look into it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

from prefetch.transfers.cuda_driver import CudaDriver

SOURCE = Path(__file__).with_suffix(".c")
COMPUTE_STREAM = 0x57


class StandInDriver(CudaDriver):
    """The project's own bindings over the stand-in, built into `folder`: every driver has a library, and so a state, of its own."""

    def __init__(self, folder: Path):
        path = folder / f"libstandin{len(list(folder.iterdir()))}.so"
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-pthread", "-o", path, SOURCE], check=True)
        self.stand_in = ctypes.CDLL(str(path))
        self.stand_in.make_current()
        super().__init__(str(path))

    def read(self, name: str) -> int:
        """A counter of the stand-in."""
        return ctypes.c_int64.in_dll(self.stand_in, name).value

    def fail_copy(self, number: int) -> None:
        """Let the copy after `number` further ones fail."""
        ctypes.c_int64.in_dll(self.stand_in, "fail_copy_at").value = number

    def fail_stream(self, number: int) -> None:
        """Let the stream after `number` further ones not be made."""
        ctypes.c_int64.in_dll(self.stand_in, "fail_stream_at").value = number

    def die(self) -> None:
        """From now on the calls that record or take down report a kernel's fault."""
        ctypes.c_int32.in_dll(self.stand_in, "is_dead").value = True

    def keep_computing(self, busy: bool) -> None:
        """Whether work on the compute stream stays unfinished; when it no longer does, all of it is done."""
        ctypes.c_int32.in_dll(self.stand_in, "compute_is_busy").value = busy
        if not busy:
            self.stand_in.finish_compute()
