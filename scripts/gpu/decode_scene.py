"""What the arms of an offloaded decode share: the machine, the sizes, generated rows, routing and guesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.quantised import QuantFormat
from kernels.quantised_experts import QuantisedGeometry
from prefetch.device import limit_memory
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertGeometry, MoEGeometry
from prefetch.memory import allocate_pages
from prefetch.transfers.cuda_driver import CudaDriver
from scripts.gpu.decode_model import DecodeModel, DecodeShape
from scripts.gpu.generated_routing import Ids, RoutingStatistics, generated_routing, guesses_of

N_DISTINCT = 512  # rows in pinned memory, which the experts share: the link does not notice
N_PACKED = 8  # of them are made one by one, the others are copies
LARGE_GUESSES = 2
# Slots are a multiple of it: kernels are compiled for multiples of 16, and the parts of a cache are such then as well.
SLOTS_STEP = 64
RECALL = {"gate_reuse": 0.734, "oracle": 1.0}  # of the model's top-k; gate reuse's on the bundled model, docs/predictors.md


@dataclass(frozen=True)
class Machine:
    """What a run needs of the machine; the tests have one without a GPU."""

    device: torch.device
    driver: Callable[[], CudaDriver] = CudaDriver
    compute_stream: Callable[[], int] = lambda: torch.cuda.current_stream().cuda_stream
    wait: Callable[[], None] = torch.cuda.synchronize

    def limit(self, n_bytes: int) -> None:
        """Let PyTorch have at most so much of the device's memory, where there is one to limit."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what is cached counts
            limit_memory(self.device, n_bytes)

    def captured(self, step: Callable[[], object]) -> Callable[[], object]:
        """`step` as a CUDA graph, warmed up; `step` itself where there are none."""
        if self.device.type != "cuda":
            return step
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # as PyTorch asks for: what is made lazily is made before the capture
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


@dataclass(frozen=True)
class Setting:
    """One comparison."""

    shape: DecodeShape
    how: QuantFormat | None  # of the experts; None is bf16
    memory_bytes: int  # of the card that is stood in for: model, KV cache and slots
    n_context: int = 8192
    n_tokens: int = 24
    n_warmup: int = 16
    n_repeats: int = 2
    dtype: torch.dtype = torch.bfloat16
    statistics: RoutingStatistics = field(default_factory=RoutingStatistics)
    reserve_bytes: int = 500_000_000  # for activations, the context and what fragments

    @property
    def experts(self) -> str:
        """ "bfloat16", or the quantised format."""
        return str(self.dtype).removeprefix("torch.") if self.how is None else str(self.how)

    @property
    def device_guesses(self) -> int:
        """Experts that a device-driven run prefetches a layer: its demand loads wait for all of a prefetch, so few if they are large."""
        return min(LARGE_GUESSES, self.shape.moe.top_k) if self.how is None else self.shape.moe.top_k

    @property
    def geometry(self) -> MoEGeometry:
        """Of the routed experts."""
        moe = self.shape.moe
        plain = ExpertGeometry(moe.hidden, moe.intermediate, self.dtype)
        expert = plain if self.how is None else QuantisedGeometry(moe.hidden, moe.intermediate, self.dtype, how=self.how)
        return MoEGeometry(moe.n_layers, moe.n_experts, moe.top_k, expert)


@dataclass
class Scene:
    """What all arms of a comparison share."""

    machine: Machine
    setting: Setting
    model: DecodeModel
    rows: Tensor  # uint8 [N_DISTINCT, row_bytes], on the host
    routing: Ids  # [n, L, k]
    guesses: dict[str, Ids]  # by arm

    @classmethod
    def make(cls, machine: Machine, setting: Setting) -> Scene:
        """Generate weights and routing."""
        moe, n_tokens = setting.shape.moe, setting.n_warmup + setting.n_tokens
        routing = generated_routing(n_tokens + 1, moe.n_layers, moe.n_experts, moe.top_k, setting.statistics, seed=0)
        guesses = {
            arm: routing if recall == 1 else guesses_of(routing, moe.n_experts, recall, setting.statistics, seed=1)
            for arm, recall in RECALL.items()
        }
        model = DecodeModel(setting.shape, setting.n_context, setting.dtype, machine.device)
        return cls(machine, setting, model, generated_rows(setting.geometry.expert, machine.device), routing, guesses)

    @property
    def row_of(self) -> Tensor:
        """int64 [L, E], which of `rows` an expert has."""
        geometry = self.setting.geometry
        return (torch.arange(geometry.n_total) % len(self.rows)).view(geometry.n_layers, geometry.n_experts)

    def n_slots(self) -> int:
        """What the budget leaves for experts, beside the model that is there already.

        Raises:
            CapacityError: nothing.
        """
        geometry = self.setting.geometry
        n_slots = (self.setting.memory_bytes - self.setting.reserve_bytes - self.model.n_bytes) // geometry.expert.row_bytes
        n_slots -= n_slots % SLOTS_STEP if n_slots > SLOTS_STEP else 0
        if n_slots < 4 * geometry.top_k:
            raise CapacityError(f"{self.setting.memory_bytes / 1e9:.1f} GB leave {max(n_slots, 0)} slots beside the model")
        return min(n_slots, geometry.n_total)


def generated_rows(geometry: ExpertGeometry, device: torch.device) -> Tensor:
    """uint8 [N_DISTINCT, row_bytes], on the host, page-aligned: experts of unit gain. Without memory where `device` has none."""
    if device.type == "meta":
        return torch.empty(N_DISTINCT, geometry.row_bytes, dtype=torch.uint8, device=device)
    pages = allocate_pages(N_DISTINCT * geometry.row_bytes, "generated experts")
    rows = torch.frombuffer(pages, dtype=torch.uint8).view(N_DISTINCT, geometry.row_bytes)
    random = torch.Generator().manual_seed(0)
    for row in rows[:N_PACKED]:
        weights = [
            torch.randn(shape, generator=random) * shape[1] ** -0.5 for shape in (geometry.gate_up_shape, geometry.down_shape)
        ]
        if isinstance(geometry, QuantisedGeometry):
            geometry.pack(weights[0], weights[1], row)
            continue
        for weight, at in zip(weights, (0, geometry.down_offset), strict=True):
            packed = weight.to(geometry.dtype).view(torch.uint8).flatten()
            row[at : at + len(packed)] = packed
    for first in range(N_PACKED, N_DISTINCT, N_PACKED):
        rows[first : first + N_PACKED] = rows[:N_PACKED]
    return rows
