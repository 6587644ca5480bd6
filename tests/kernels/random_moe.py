"""Random MoE layer calls for kernel tests: unit-scale outputs, experts scattered over slots, outputs poisoned beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.moe_call import MoECall, moe_mlp_reference
from kernels.quantised import QuantFormat
from kernels.quantised_experts import QuantisedTable
from kernels.slot_table import ExpertTable, addresses_of
from prefetch.geometry import ExpertGeometry
from prefetch.quantised_geometry import QuantisedGeometry

# ||out - reference|| / ||reference|| against float64 arithmetic on the same rounded inputs, whole MLP.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
N_LAYERS = 2
FORMATS = [QuantFormat(kind, group) for kind in ("int8", "int4") for group in (128, 64, 32)]
FORMATS += [QuantFormat("fp8"), QuantFormat("mxfp4", 32)]


@dataclass(frozen=True)
class Sizes:
    """Of one call: `n_absent` experts of the layer are in no slot."""

    n_tokens: int
    hidden: int
    intermediate: int
    n_experts: int
    top_k: int
    n_absent: int = 0


def random_table(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator, by_address: bool = False) -> ExpertTable:
    """Experts of unit gain in shuffled slots; all other bytes of the pools are NaN in every float dtype."""
    geometry = ExpertGeometry(sizes.hidden, sizes.intermediate, dtype)
    n_total = N_LAYERS * sizes.n_experts
    pools = [torch.full((n_total + 1, geometry.row_bytes), 0xFF, dtype=torch.uint8) for _ in range(1 + by_address)]
    slots = torch.randperm(n_total + 1, generator=generator)[:n_total].view(N_LAYERS, sizes.n_experts)
    in_pool = torch.randint(len(pools), slots.shape, generator=generator)
    absent = torch.randperm(sizes.n_experts, generator=generator)[: sizes.n_absent]
    entries = (
        torch.where(in_pool == 0, addresses_of(pools[0])[slots], addresses_of(pools[-1])[slots]) if by_address else slots.int()
    )
    entries[1, absent] = 0 if by_address else -1
    table = ExpertTable(geometry, tuple(pools), entries)
    for layer in range(N_LAYERS):
        for expert in range(sizes.n_experts):
            for weight in table.expert(layer, expert) or ():
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return table


def random_call(
    sizes: Sizes,
    dtype: torch.dtype,
    seed: int,
    *,
    by_address: bool = False,
    biases: bool = False,
    addends: bool = False,
    **changes: Any,
) -> MoECall:
    """A call on layer 1 of a random table: distinct experts for each token, weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    table = random_table(sizes, dtype, generator, by_address)
    order = torch.rand(sizes.n_tokens, sizes.n_experts, generator=generator).argsort(dim=1)
    optional = {}
    if biases:
        optional = {
            "gate_up_bias": normal(sizes.n_experts, 2 * sizes.intermediate),
            "down_bias": normal(sizes.n_experts, sizes.hidden),
        }
    if addends:
        optional |= {"shared": normal(sizes.n_tokens, sizes.hidden), "residual": normal(sizes.n_tokens, sizes.hidden)}
    arguments: dict[str, Any] = {
        "x": normal(sizes.n_tokens, sizes.hidden),
        "ids": order[:, : sizes.top_k].int(),
        "weights": torch.rand(sizes.n_tokens, sizes.top_k, generator=generator).softmax(dim=1),
        "table": table,
        "layer": 1,
        **optional,
    }
    return MoECall(**{**arguments, **changes})


def quantised_call(
    sizes: Sizes, how: QuantFormat, dtype: torch.dtype, seed: int, by_address: bool = False, **options: Any
) -> MoECall:
    """A random call whose experts are quantised, in the same slots of one pool that is otherwise all ones."""
    plain = random_call(sizes, dtype, seed, **options)
    geometry = QuantisedGeometry(sizes.hidden, sizes.intermediate, dtype, how=how)
    pool = torch.full((len(plain.table.pools[0]), geometry.row_bytes), 0xFF, dtype=torch.uint8)
    slots = plain.table.entries
    for layer in range(N_LAYERS):
        for expert in range(sizes.n_experts):
            found = plain.table.expert(layer, expert)
            if found is not None:
                geometry.pack(*found, pool[int(slots[layer, expert])])
    entries = torch.where(slots < 0, 0, addresses_of(pool)[slots.clamp(min=0)]) if by_address else slots
    return replace(plain, table=QuantisedTable(geometry, (pool,), entries))


def poisoned(call: MoECall) -> tuple[Tensor, Tensor]:
    """`out` full of NaN and a lowered miss flag."""
    return torch.full_like(call.x, float("nan")), torch.zeros(1, dtype=torch.int32)


def check_result(call: MoECall, out: Tensor, missed: Tensor) -> None:
    """Assert that `out` and `missed` are those of float64 arithmetic on the same rounded inputs."""
    expected, expected_miss = moe_mlp_reference(call, torch.float64)
    assert bool(missed) == expected_miss
    assert torch.isfinite(out).all()
    error = float((out.double() - expected).norm())
    assert error <= TOLERANCES[call.x.dtype] * float(expected.norm()), error / float(expected.norm())
