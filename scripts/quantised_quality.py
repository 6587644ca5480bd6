"""What quantising the experts costs the bundled model: `python -m scripts.quantised_quality`.

Every expert is replaced by what `kernels.quantised` makes of it and reads back; all else stays as it is, and arithmetic is fp32.
Scored on windows spread evenly over the held-out text, with the unquantised experts beside them on the same windows:
bits per byte, and agreement = the mean share of a token's top-k experts that the router still selects, over all layers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3MoeForCausalLM

from experiments.progress import progress_bar
from kernels.quantised import QuantFormat, dequantise, quantise
from scripts.bundled_corpus import split_library
from scripts.bundled_evaluation import WINDOW, windows_of

BUNDLED = Path(__file__).parents[1] / "models" / "bytes-moe"
FORMATS = (QuantFormat("int8", 32), QuantFormat("fp8"), QuantFormat("int4", 32), QuantFormat("mxfp4", 32))


@dataclass(frozen=True)
class Observed:
    """A model's behaviour on some tokens."""

    bits_per_byte: float
    topk_ids: Tensor  # [layers, tokens, k]


@dataclass(frozen=True)
class Quality:
    """One format, beside the same model unquantised."""

    name: str
    bits_per_weight: float  # with scales
    weight_error: float  # ||quantised - weights|| / ||weights|| over all experts
    bits_per_byte: float
    agreement: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=64, help=f"how many windows of {WINDOW} bytes to score")
    n_windows = parser.parse_args().windows
    model = Qwen3MoeForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    Console().print(table(compare(model, held_out_windows(n_windows))))


def held_out_windows(n_windows: int) -> Tensor:
    """Token ids [n, WINDOW + 1], spread evenly over the held-out files."""
    held_out = split_library()[1]
    pieces = [tokens for data in held_out.files.values() for tokens, _ in windows_of(data) if len(tokens) == WINDOW + 1]
    return torch.stack(pieces[:: max(1, len(pieces) // n_windows)][:n_windows])


def compare(model: Qwen3MoeForCausalLM, windows: Tensor) -> list[Quality]:
    """The model as it is, then with every format; the model's weights are back in place afterwards."""
    with progress_bar("scoring", (1 + len(FORMATS)) * len(windows)) as advance:
        plain = observe(model, windows, advance)
        found = [Quality("unquantised", 16, 0, plain.bits_per_byte, 1)]
        for how in FORMATS:
            with quantised_experts(model, how) as weight_error:
                seen = observe(model, windows, advance)
            kept = (plain.topk_ids[..., :, None] == seen.topk_ids[..., None, :]).any(-1).float().mean()
            found.append(Quality(str(how), _bits_per_weight(model, how), weight_error, seen.bits_per_byte, float(kept)))
    return found


@torch.inference_mode()
def observe(model: Qwen3MoeForCausalLM, windows: Tensor, advance: Callable[[], None]) -> Observed:
    """Score windows [n, S + 1] one at a time, with an `advance` after each."""
    routed: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out[2]))
        for layer, seen in zip(model.model.layers, routed, strict=True)
    ]
    try:
        logits = []
        for window in windows:
            logits.append(model(input_ids=window[None, :-1], use_cache=False).logits[0])
            advance()
    finally:
        for hook in hooks:
            hook.remove()
    nats = F.cross_entropy(torch.cat(logits), windows[:, 1:].flatten())
    return Observed(float(nats) / math.log(2), torch.stack([torch.cat(ids) for ids in routed]))


@contextmanager
def quantised_experts(model: Qwen3MoeForCausalLM, how: QuantFormat) -> Iterator[float]:
    """The model with quantised experts; gives the relative error of their weights."""
    parameters = [
        weight for layer in model.model.layers for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
    ]
    originals = [weight.data for weight in parameters]
    try:
        for weight, original in zip(parameters, originals, strict=True):
            weight.data = dequantise(quantise(original.flatten(0, 1), how), how).view_as(original)
        change = sum(float((weight.data - old).square().sum()) for weight, old in zip(parameters, originals, strict=True))
        yield math.sqrt(change / sum(float(old.square().sum()) for old in originals))
    finally:
        for weight, original in zip(parameters, originals, strict=True):
            weight.data = original


def _bits_per_weight(model: Qwen3MoeForCausalLM, how: QuantFormat) -> float:
    experts = model.model.layers[0].mlp.experts
    shapes = [tuple(weight.shape[1:]) for weight in (experts.gate_up_proj, experts.down_proj)]
    n_bytes = sum(sum(how.n_bytes(*shape)) for shape in shapes)
    return 8 * n_bytes / sum(math.prod(shape) for shape in shapes)


def table(found: list[Quality]) -> Table:
    """One line a format."""
    shown = Table("experts", "bits a weight", "weight error", "bits per byte", "change", "agreement")
    plain = found[0].bits_per_byte
    for quality in found:
        change = f"{100 * (quality.bits_per_byte / plain - 1):+.2f} %"
        shown.add_row(
            quality.name,
            f"{quality.bits_per_weight:.2f}",
            f"{100 * quality.weight_error:.2f} %",
            f"{quality.bits_per_byte:.4f}",
            change,
            f"{100 * quality.agreement:.2f} %",
        )
    return shown


if __name__ == "__main__":
    main()
