"""The expert part of an MoE layer on a GPU: few tokens by `decode_mlp`, many by `grouped_mlp`.

`decode_mlp` reads an expert once for each token that wants it, `grouped_mlp` once, but it sorts first and fills tiles up. So
the choice goes by pairs per touched expert. Which experts are touched is only known on the device, and asking would wait
for it: the host takes their expected number under uniform routing, E * (1 - (1 - k/E)^T). Real routing is more skewed, so
the true figure is higher and the switch comes late rather than early.
"""

from __future__ import annotations

from torch import Tensor

from kernels.decode_mlp import MAX_PAIRS, decode_mlp
from kernels.decode_quantised import decode_quantised
from kernels.grouped_mlp import grouped_mlp
from kernels.moe_call import MoECall
from kernels.quantised_experts import QuantisedTable
from prefetch.errors import KernelInputError

GROUPED_ABOVE = 1.2  # pairs per touched expert
PATHS = {"decode": decode_mlp, "grouped": grouped_mlp}
QUANTISED_PATHS = {"decode": decode_quantised, "grouped": grouped_mlp}


def moe_mlp(call: MoECall, out: Tensor | None = None, missed: Tensor | None = None, path: str = "auto") -> Tensor:
    """The expert part of one MoE layer.

    Args:
        call: what to compute; its experts may be quantised.
        out: [T, H] for the result, like `call.x`; by default new memory.
        missed: int32 [1], set to 1 where a token needs an absent expert, else left alone. By default nobody is told.
        path: `decode`, `grouped`, or `auto`: by pairs per touched expert.

    Returns:
        `out`.

    Raises:
        KernelInputError: an unknown path, `out` or `missed` that do not fit, or a machine that cannot run the kernels.
    """
    if path == "auto":
        path = choose_path(call.n_tokens, call.table.n_experts, call.top_k)
    if path not in PATHS:
        raise KernelInputError(f"path={path!r} is unknown; choose auto, {' or '.join(PATHS)}")
    paths = QUANTISED_PATHS if isinstance(call.table, QuantisedTable) else PATHS
    return paths[path](call, out, missed)


def choose_path(n_tokens: int, n_experts: int, top_k: int) -> str:
    """`decode` or `grouped`."""
    if n_tokens * top_k > MAX_PAIRS or pairs_per_touched_expert(n_tokens, n_experts, top_k) > GROUPED_ABOVE:
        return "grouped"
    return "decode"


def pairs_per_touched_expert(n_tokens: int, n_experts: int, top_k: int) -> float:
    """Expected, where each token draws its experts uniformly and independently of other tokens."""
    n_touched = n_experts * (1 - (1 - top_k / n_experts) ** n_tokens)
    return n_tokens * top_k / n_touched
