"""The few functions of the CUDA driver that moving experts needs, called through ctypes.

PyTorch has no call for pinning memory that exists already (its own pinned allocations are rounded up to powers of two), and the
worker threads of `pool.c` must not take the interpreter lock to start a copy. All of it runs in PyTorch's own context.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

from prefetch.errors import ConfigError, TransferError

LIBRARY = "libcuda.so.1"
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no implicit order with the legacy default stream
WITHOUT_TIMING = 2  # CU_EVENT_DISABLE_TIMING
PORTABLE_AND_MAPPED = 3  # CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP

SIGNATURES: dict[str, tuple[type, ...]] = {
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint32),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint32),
    "cuStreamCreate": (POINTER(c_void_p), c_uint32),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint32),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuEventCreate": (POINTER(c_void_p), c_uint32),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
    "cuGetErrorString": (c_int32, POINTER(c_char_p)),
}


class CudaDriver:
    """The driver, in the context that is current on the thread that opens it (PyTorch's, once CUDA is initialised).

    Raises:
        ConfigError: there is no driver.
        TransferError: it has no context yet, or, from any method, it reports an error.
    """

    def __init__(self, library: str = LIBRARY):
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise ConfigError(f"backend=cuda needs the CUDA driver, and {library} cannot be loaded: {error}") from error
        for name, arguments in SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = c_int32, arguments
        context = c_void_p()
        self._call("cuCtxGetCurrent", byref(context))
        if not context.value:
            raise TransferError("no CUDA context is current: initialise CUDA first (torch.cuda.init)")
        self.context = context.value

    def address_of(self, function: str) -> int:
        """Where `function` is, for native code to call."""
        return ctypes.cast(getattr(self._library, function), c_void_p).value or 0

    def error_string(self, code: int) -> str:
        """What the driver says of `code`."""
        text = c_char_p()
        self._library.cuGetErrorString(code, byref(text))
        return (text.value or b"unknown error").decode()

    def pin(self, address: int, n_bytes: int) -> int:
        """Page-lock exactly `n_bytes` at `address`; returns the address by which the GPU reads them."""
        self._call("cuMemHostRegister_v2", address, n_bytes, PORTABLE_AND_MAPPED)
        mapped = c_uint64()
        try:
            self._call("cuMemHostGetDevicePointer_v2", byref(mapped), address, 0)
        except TransferError:
            self.unpin(address)
            raise
        return mapped.value

    def unpin(self, address: int) -> None:
        """Undo `pin`."""
        self._undo("cuMemHostUnregister", address)

    def new_stream(self) -> int:
        """A stream for copies beside the compute stream."""
        return self._new("cuStreamCreate", NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        """Once its work is done."""
        self._undo("cuStreamDestroy_v2", stream)

    def new_event(self) -> int:
        """An event; nobody waits for it before it has been recorded."""
        return self._new("cuEventCreate", WITHOUT_TIMING)

    def record(self, event: int, stream: int) -> None:
        """`event` passes when everything enqueued on `stream` so far is done."""
        self._call("cuEventRecord", event, stream)

    def destroy_event(self, event: int) -> None:
        """Once nobody waits for it any more."""
        self._undo("cuEventDestroy_v2", event)

    def _new(self, function: str, flags: int) -> int:
        handle = c_void_p()
        self._call(function, byref(handle), flags)
        return handle.value or 0

    def _undo(self, function: str, handle: int) -> None:
        """After a kernel's fault each call reports that fault again: taking down must go on, and must not hide where it came from."""
        getattr(self._library, function)(handle)

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            raise TransferError(f"the CUDA driver's {function} failed: {self.error_string(code)} (error {code})")
