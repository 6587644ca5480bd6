"""Time the experts of one MoE layer on the CPU: this project's path beside transformers' own implementations.

    python -m scripts.bench_kernels outputs/kernels/bench_kernels.json

All implementations take turns within one run, so that a machine that slows down slows all of them. Successive calls use
different tokens and routings, as in decoding. Experts are resident; what the runtime does around them is measured by
`experiments.bench`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from experiments.atomic import write_json
from experiments.progress import progress_bar
from experiments.provenance import provenance
from experiments.statistics import paired_ratio, spread
from kernels.expert_mlp import expert_mlps
from prefetch.dispatch import dispatch

OURS = "gatecast"
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")  # its implementations that run on a CPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = (1, 2, 4, 8, 16, 64)
N_INPUTS = 8  # different calls in turn
TURN_S = 0.02  # of one implementation, at least; longer calls are made once
HOPELESS = 20  # times slower than the fastest of transformers' in the first round: not measured further
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative norm, between implementations
SEED = 0


@dataclass(frozen=True)
class Shape:
    """The experts of one layer."""

    hidden: int
    intermediate: int
    n_experts: int
    top_k: int


SHAPES = {"bytes-moe": Shape(192, 96, 32, 4), "OLMoE-like": Shape(1024, 512, 64, 8)}
Inputs = tuple[Tensor, Tensor, Tensor]  # hidden [T, H], expert ids int64 [T, k], weights [T, k]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_kernels", description="Time the CPU path of the experts.")
    parser.add_argument("json", type=Path, help="where to write the measurements")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--repeats", type=int, default=21, help="rounds in which every implementation has its turn")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with torch.inference_mode():
        rows = measure_all(chosen.repeats)
    write_json(chosen.json, {"provenance": provenance(SEED), "repeats": chosen.repeats, "rows": rows})
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows, chosen.threads))


def measure_all(repeats: int) -> list[dict[str, Any]]:
    """One row for each shape, dtype and number of tokens."""
    rows = []
    with progress_bar("experts on the CPU", len(SHAPES) * len(DTYPES) * len(TOKENS)) as advance:
        for (shape_name, shape), (dtype_name, dtype) in product(SHAPES.items(), DTYPES.items()):
            generator = torch.Generator().manual_seed(SEED)
            layers = implementations(shape, dtype, generator)
            for n_tokens in TOKENS:
                inputs = [random_inputs(shape, n_tokens, dtype, generator) for _ in range(N_INPUTS)]
                check_agreement(layers, inputs[0])
                call_s = measure(layers, inputs, repeats)
                where = {"shape": shape_name, **asdict(shape), "dtype": dtype_name, "tokens": n_tokens}
                rows.append(where | compare(call_s) | {"call_s": call_s})
                advance()
    return rows


def implementations(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Layer]:
    """Every implementation as a function of `Inputs`, all over the same random weights."""
    e, h, i = shape.n_experts, shape.hidden, shape.intermediate
    gate_up = (torch.randn(e, 2 * i, h, generator=generator) / h**0.5).to(dtype)
    down = (torch.randn(e, h, i, generator=generator) / i**0.5).to(dtype)
    experts = list(zip(gate_up.mT, down.mT, strict=True))  # as slots give them

    def ours(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What the runtime does in a layer call with every expert in its slot."""
        work = dispatch(ids)
        inputs = work.inputs(hidden)
        rows = expert_mlps(list(inputs.values()), [experts[expert] for expert in inputs])
        return work.combine(dict(zip(inputs, rows, strict=True)), weights)

    return {OURS: ours} | {name: _of_transformers(name, shape, gate_up, down) for name in TRANSFORMERS}


def _of_transformers(name: str, shape: Shape, gate_up: Tensor, down: Tensor) -> Layer:
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.n_experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation=name,
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.load_state_dict({"gate_up_proj": gate_up, "down_proj": down}, assign=True)
    return module


def random_inputs(shape: Shape, n_tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Unit-scale states, distinct uniformly drawn experts for each token, weights that sum to 1."""
    hidden = torch.randn(n_tokens, shape.hidden, generator=generator).to(dtype)
    ids = torch.rand(n_tokens, shape.n_experts, generator=generator).argsort(dim=1)[:, : shape.top_k].contiguous()
    return hidden, ids, torch.rand(ids.shape, generator=generator).softmax(dim=1).to(dtype)


def check_agreement(layers: Mapping[str, Layer], inputs: Inputs) -> None:
    """Speed of wrong results is of no interest."""
    results = {name: layer(*inputs).double() for name, layer in layers.items()}
    for name, result in results.items():
        error = float((result - results["eager"]).norm() / results["eager"].norm())
        if not error <= AGREEMENT[inputs[0].dtype]:
            raise RuntimeError(f"{name} differs from transformers' eager by {error:.1e} of the result's norm")


def measure(layers: Mapping[str, Layer], inputs: list[Inputs], repeats: int) -> dict[str, list[float]]:
    """Seconds a call, one value for each round; implementations that the first round finds hopeless are left out."""
    first_s = {name: _turn_s(layer, inputs, 1) for name, layer in layers.items()}
    limit_s = HOPELESS * min(first_s[name] for name in TRANSFORMERS)
    measured = {name: layer for name, layer in layers.items() if name == OURS or first_s[name] <= limit_s}
    n_calls = {name: max(1, round(TURN_S / first_s[name])) for name in measured}
    call_s: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(repeats):
        for name, layer in measured.items():
            call_s[name].append(_turn_s(layer, inputs, n_calls[name]))
    return call_s


def _turn_s(layer: Layer, inputs: list[Inputs], n_calls: int) -> float:
    started = time.perf_counter()
    for arguments in islice(cycle(inputs), n_calls):
        layer(*arguments)
    return (time.perf_counter() - started) / n_calls


def compare(call_s: Mapping[str, list[float]]) -> dict[str, Any]:
    """Our speed over that of the fastest of transformers' implementations, paired by round."""
    fastest = min((name for name in call_s if name != OURS), key=lambda name: spread(call_s[name]).median)
    return {"fastest_of_transformers": fastest, "speed_ratio": asdict(paired_ratio(call_s[fastest], call_s[OURS]))}


def table(rows: list[dict[str, Any]], threads: int) -> Table:
    """Microseconds a call, median of the rounds; a dash is an implementation too slow to be worth the time."""
    names = (OURS, *TRANSFORMERS)
    shown = Table(
        title=f"Experts of one layer on the CPU, {threads} thread(s): µs a call", caption="speed: median [lowest, highest]"
    )
    for column in ("shape", "dtype", "tokens", *names, "speed over the fastest"):
        shown.add_column(column, justify="left" if column in ("shape", "dtype") else "right")
    for row in rows:
        times = [f"{1e6 * spread(row['call_s'][name]).median:.0f}" if name in row["call_s"] else "–" for name in names]
        ratio = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["speed_ratio"])
        shown.add_row(row["shape"], row["dtype"], str(row["tokens"]), *times, ratio)
    return shown


if __name__ == "__main__":
    main()
