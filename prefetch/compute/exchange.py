"""Small tensors between the host and the device that computes: one wait a layer call for what comes, none for what goes.

A copy out of pageable memory makes the host wait, and each tensor fetched by itself is a wait more. So everything goes through pinned
memory, on the current stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

RING_WORDS = 1 << 14  # of 8 bytes: what some dozens of parts of a layer call send
MOST_KINDS = 16  # sets of tensors for which memory is kept


class Exchange:
    """The host's end. What has been sent has left pinned memory when the next `fetch` returns: that memory is then written anew.

    Args:
        device: the other end; where it is the CPU, "pinned" memory is any.
    """

    def __init__(self, device: torch.device):
        self.device, self.is_gpu = device, device.type == "cuda"
        self._arrived = torch.cuda.Event() if self.is_gpu else None
        self._landings: dict[tuple, list[Tensor]] = {}
        self._ring, self._words = self._new_ring(RING_WORDS)
        self._used = 0

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the host. Waits for them, and so for all that was enqueued before."""
        kind = tuple([(tensor.shape, tensor.dtype) for tensor in tensors])
        landing = self._landings.get(kind) or self._new_landing(kind)
        for place, tensor in zip(landing, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        self.wait()
        return [place.clone() for place in landing]

    def send(self, words: array[int]) -> Tensor:
        """int64 [n] on the device. The host may go on at once, and change `words`."""
        first, n_words = self._used, len(words)
        if first + n_words > len(self._words):
            self.wait()
            first = 0
        if n_words > len(self._words):
            self._ring, self._words = self._new_ring(2 * n_words)
        self._used = first + n_words
        self._words[first : self._used] = words
        return self._ring[first : self._used].to(self.device, non_blocking=True, copy=True)

    def send_tensor(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, by way of pinned memory of its own."""
        return (tensor.pin_memory() if self.is_gpu else tensor).to(self.device, non_blocking=True)

    def wait(self) -> None:
        """Until all that was enqueued is done."""
        if self._arrived is not None:
            self._arrived.record()
            self._arrived.synchronize()
        self._used = 0

    def _new_ring(self, n_words: int) -> tuple[Tensor, memoryview]:
        """A tensor, and a view of the same memory: writing through that costs a tenth of torch's time."""
        ring = torch.empty(n_words, dtype=torch.int64, pin_memory=self.is_gpu)
        return ring, ring.numpy().data.cast("B").cast("q")

    def _new_landing(self, kind: tuple) -> list[Tensor]:
        if len(self._landings) >= MOST_KINDS:  # prompts of many lengths; decoding's few kinds are soon back
            self._landings.clear()
        with torch.inference_mode(False):  # it outlives the mode that the first call is made in
            made = [torch.empty(shape, dtype=dtype, pin_memory=self.is_gpu) for shape, dtype in kind]
        self._landings[kind] = made
        return made
