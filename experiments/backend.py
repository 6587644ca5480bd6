"""Where experts lie, move and are computed: the same parts for both backends, PyTorch on the CPU and kernels on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from prefetch.compute.base import ExpertCompute
from prefetch.compute.kernel_experts import KernelExperts
from prefetch.compute.torch_experts import TorchExperts
from prefetch.device import compute_device, device_memory, limit_memory, settle
from prefetch.errors import CapacityError, ConfigError
from prefetch.slots import SlotPool, parse_bytes
from prefetch.store import ExpertStore
from prefetch.transfers.base import Transfers
from prefetch.transfers.cuda_driver import CudaDriver
from prefetch.transfers.link import EmulatedLink
from prefetch.transfers.pinned import PinnedSource, SlotFences
from prefetch.transfers.sources import DiskSource, HostSource, Source
from prefetch.transfers.threads import ThreadTransfers


@dataclass(frozen=True)
class Backend:
    """One arm's machinery."""

    pool: SlotPool
    transfers: Transfers
    compute: ExpertCompute


def build_source(cfg: DictConfig, store: ExpertStore, n_threads: int | None = None) -> Source:
    """The backing tier, open: a file, RAM, or with a GPU pinned RAM. At most `n_threads` threads move bytes out of it; by default the tier's."""
    place = store.path, store.offset, store.row_bytes
    if cfg.tier.kind == "disk":
        return DiskSource(*place)
    if cfg.backend.kind == "torch":
        return HostSource(*place)
    compute_device(cfg.backend.kind)
    return PinnedSource(*place, CudaDriver(), n_threads or cfg.tier.n_threads)


class BackingTiers:
    """The open backing tiers of a comparison's arms, one of each kind: what loads and pins all experts is done once.

    Args:
        n_threads: the most that any arm's transfers have.
    """

    def __init__(self, store: ExpertStore, n_threads: int):
        self.store, self.n_threads = store, n_threads
        self._sources: dict[tuple[str, str], Source] = {}
        self._open = ExitStack()

    def of(self, cfg: DictConfig) -> Source:
        """The backing tier of `cfg`."""
        kind = cfg.tier.kind, cfg.backend.kind
        if kind not in self._sources:
            source = build_source(cfg, self.store, self.n_threads)
            self._sources[kind] = self._open.enter_context(closing(source))
        return self._sources[kind]

    def __enter__(self) -> BackingTiers:
        return self

    def __exit__(self, *reason: object) -> None:
        self._open.close()  # all of them, whatever the closing of one raises


def use_device(backend: DictConfig) -> torch.device:
    """The device that `backend` names, all of its memory free to use; PyTorch's CPU threads are set too.

    Raises:
        ConfigError: as `compute_device`.
    """
    torch.set_num_threads(backend.n_threads)
    device = compute_device(backend.kind)
    if device.type == "cuda":
        # The jobs of a sweep share a process: the last one's limit is lifted, and its model is let go.
        enforce_budget(device, device_memory(device))
    return device


def memory_budget(backend: DictConfig, device: torch.device) -> int | None:
    """Bytes that model, slots and KV cache may take on `device`, a GPU; None for the CPU.

    Raises:
        CapacityError: `backend.memory` is no size, or more than there is.
    """
    if device.type == "cpu":
        return None
    total_bytes = device_memory(device)
    n_bytes = total_bytes if backend.memory is None else parse_bytes(backend.memory, "backend.memory")
    if n_bytes > total_bytes:
        name = torch.cuda.get_device_name(device)
        raise CapacityError(f"backend.memory={backend.memory}, but {name} has {total_bytes / 1e9:.1f} GB")
    return n_bytes


def enforce_budget(device: torch.device, n_bytes: int) -> None:
    """From now on PyTorch has no more than `n_bytes` on `device`; what ran before may have had more."""
    gc.collect()  # a model's modules refer to each other
    torch.cuda.empty_cache()
    limit_memory(device, n_bytes)


def refuse_gpu(backend: DictConfig, program: str) -> None:
    """Stop a program that computes on the CPU alone.

    Raises:
        ConfigError: `backend` is another.
    """
    if backend.kind != "torch":
        raise ConfigError(
            f"backend={backend.kind}: {program} computes on the CPU (backend=torch); experiments.decode knows both"
        )


@contextmanager
def backend(cfg: DictConfig, store: ExpertStore, n_slots: int, source: Source) -> Iterator[Backend]:
    """Slots, transfers and compute, closed at the end of the block."""
    with ExitStack() as stack:
        if isinstance(source, PinnedSource):
            yield stack.enter_context(_gpu(cfg, store, n_slots, source))
            return
        pool = SlotPool(store.geometry, n_slots)
        transfers = _transfers(cfg, store, pool, source)
        stack.callback(transfers.close)
        yield Backend(pool, transfers, TorchExperts(pool))


@contextmanager
def _gpu(cfg: DictConfig, store: ExpertStore, n_slots: int, source: PinnedSource) -> Iterator[Backend]:
    device = compute_device(cfg.backend.kind)
    with ExitStack() as stack:
        fences = SlotFences(source.driver, n_slots, lambda: torch.cuda.current_stream(device).cuda_stream)
        stack.callback(fences.close)
        stack.callback(settle, device)  # kernels may still read slots, and pinned memory that its owner unpins next
        pool = SlotPool(store.geometry, n_slots, device, on_release=fences.raise_at)
        transfers = _transfers(cfg, store, pool, source, fences.event)
        stack.callback(transfers.close)
        compute = KernelExperts(store.geometry, pool, source.mapped_address if cfg.backend.in_place == "gpu" else None)
        yield Backend(pool, transfers, compute)
        compute.check()


def _transfers(
    cfg: DictConfig, store: ExpertStore, pool: SlotPool, source: Source, fence: Callable[[int], int] = lambda slot: 0
) -> Transfers:
    tier = cfg.tier
    return ThreadTransfers(
        source,
        pool.buffer,
        n_threads=tier.n_threads,
        chunk_bytes=tier.chunk_bytes,
        slot_address=pool.address,
        fence=fence,
        link=EmulatedLink(tier.link.bytes_per_s, tier.link.latency_s) if tier.link else None,
        check=store.check_row if tier.verify else None,
    )
