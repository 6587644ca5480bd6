"""Where experts lie, move and are computed: the same parts for both backends, PyTorch on the CPU and kernels on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from prefetch.compute.base import ExpertCompute
from prefetch.compute.kernel_experts import KernelExperts
from prefetch.compute.torch_experts import TorchExperts
from prefetch.device import compute_device, limit_memory
from prefetch.errors import ConfigError
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


def build_source(cfg: DictConfig, store: ExpertStore) -> Source:
    """The backing tier, open: a file, RAM, or with a GPU pinned RAM."""
    place = store.path, store.offset, store.row_bytes
    if cfg.tier.kind == "disk":
        return DiskSource(*place)
    if cfg.backend.kind == "torch":
        return HostSource(*place)
    compute_device(cfg.backend.kind)
    return PinnedSource(*place, CudaDriver(), cfg.tier.n_threads)


class BackingTiers:
    """The open backing tiers of a comparison's arms, one of each kind: what loads and pins all experts is done once."""

    def __init__(self, store: ExpertStore):
        self.store = store
        self.sources: dict[tuple[str, str, int], Source] = {}

    def of(self, cfg: DictConfig) -> Source:
        """The backing tier of `cfg`."""
        kind = cfg.tier.kind, cfg.backend.kind, cfg.tier.n_threads
        if kind not in self.sources:
            self.sources[kind] = build_source(cfg, self.store)
        return self.sources[kind]

    def __enter__(self) -> BackingTiers:
        return self

    def __exit__(self, *reason: object) -> None:
        for source in self.sources.values():
            source.close()


def use_device(backend: DictConfig) -> torch.device:
    """The device that `backend` names, with its limits set; PyTorch's CPU threads too.

    Raises:
        ConfigError, CapacityError: as `compute_device` and `limit_memory`.
    """
    torch.set_num_threads(backend.n_threads)
    device = compute_device(backend.kind)
    if backend.memory is not None:
        limit_memory(device, parse_bytes(backend.memory, "backend.memory"))
    return device


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
