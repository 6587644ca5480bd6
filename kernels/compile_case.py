"""What a kernel file hands to the ahead-of-time compiler: launches at the sizes of real models, and what their code must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.gated_activation import CLAMPED_SWIGLU, SWIGLU, GatedActivation
from kernels.launch import Launch
from kernels.moe_call import MoECall
from kernels.quantised import QuantFormat
from kernels.quantised_experts import expert_table
from prefetch.geometry import ExpertGeometry
from prefetch.quantised_geometry import QuantisedGeometry

SHORT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Expectations:
    """What the machine code must satisfy, beside no spills and shared memory within the part's limit."""

    max_registers: int = 128  # per thread: 4 programs of 4 warps stay resident on an NVIDIA multiprocessor
    wide_loads: bool = False  # 16-byte loads from global memory
    kilobytes_in_flight: int = 0  # of a program, in 16-byte loads: what hides the latency of memory
    tensor_cores: bool = False  # matrix instructions


@dataclass(frozen=True)
class CompileCase:
    """One launch to compile. `name` says model, tokens and dtype, e.g. "Qwen3-30B-A3B T=1 bf16"."""

    name: str
    launch: Launch
    expect: Expectations = Expectations()

    @property
    def kernel_name(self) -> str:
        return str(self.launch.kernel.__name__).strip("_")


@dataclass(frozen=True)
class ModelShape:
    """The routed experts of one layer of a published model."""

    hidden: int
    intermediate: int
    n_experts: int
    top_k: int
    activation: GatedActivation = SWIGLU
    biases: bool = False


# Source: the configuration classes' published checkpoints on the Hugging Face Hub.
MODELS = {
    "Qwen3-30B-A3B": ModelShape(2048, 768, 128, 8),
    "Mixtral-8x7B": ModelShape(4096, 14336, 8, 2),
    "gpt-oss-20b": ModelShape(2880, 2880, 32, 4, CLAMPED_SWIGLU, biases=True),
}


def model_calls(tokens: tuple[int, ...]) -> Iterator[tuple[str, MoECall]]:
    """A name and a call of meta tensors for every model and number of tokens in bf16, and other variants of the first model.

    fp16 is compiled as bf16 is, and fp32 is for tests: one model of each is enough.
    """
    first, shape = next(iter(MODELS.items()))
    for n_tokens in tokens:
        for model in MODELS:
            yield f"{model} T={n_tokens} bf16", meta_call(MODELS[model], n_tokens, torch.bfloat16)
        for dtype in (torch.float16, torch.float32):
            yield f"{first} T={n_tokens} {SHORT_NAMES[dtype]}", meta_call(shape, n_tokens, dtype)
    yield f"{first} T={tokens[0]} bf16 by address", meta_call(shape, tokens[0], torch.bfloat16, by_address=True)


def quantised_calls(tokens: tuple[int, ...]) -> Iterator[tuple[str, MoECall]]:
    """A name and a call of meta tensors in bf16 for every number of tokens and kind of code, without and with biases."""
    formats = [QuantFormat("int8", 64), QuantFormat("int4", 64), QuantFormat("fp8"), QuantFormat("mxfp4", 32)]
    cases = {"Qwen3-30B-A3B": [*formats, QuantFormat("int4", 128)], "gpt-oss-20b": formats}
    for n_tokens in tokens:
        for model, allowed in cases.items():
            for how in allowed:
                yield f"{model} T={n_tokens} bf16 {how}", meta_call(MODELS[model], n_tokens, torch.bfloat16, how=how)


def meta_call(
    shape: ModelShape, n_tokens: int, dtype: torch.dtype, by_address: bool = False, how: QuantFormat | None = None
) -> MoECall:
    """A call without memory: as many slots as the layer has experts, quantised where `how` says so."""

    def meta(*sizes: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=kind, device="meta")

    entries = meta(1, shape.n_experts, kind=torch.int64 if by_address else torch.int32)
    geometry = (
        ExpertGeometry(shape.hidden, shape.intermediate, dtype)
        if how is None
        else QuantisedGeometry(shape.hidden, shape.intermediate, dtype, how=how)
    )
    pool = meta(shape.n_experts, geometry.row_bytes, kind=torch.uint8)
    return MoECall(
        x=meta(n_tokens, shape.hidden),
        ids=meta(n_tokens, shape.top_k, kind=torch.int32),
        weights=meta(n_tokens, shape.top_k, kind=torch.float32),
        table=expert_table(geometry, (pool,), entries),
        layer=0,
        activation=shape.activation,
        gate_up_bias=meta(shape.n_experts, 2 * shape.intermediate) if shape.biases else None,
        down_bias=meta(shape.n_experts, shape.hidden) if shape.biases else None,
    )


def meta_outputs(call: MoECall) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `missed` for a call of meta tensors."""
    return torch.empty_like(call.x), torch.empty(1, dtype=torch.int32, device="meta")
