"""The coming layer's router on a corrected state (`predictors/corrected_gate.py`), its norm fused in, in one launch.

    x = norm(residual + offset)                                       RMSNorm of the target layer
    logits = W (x + B gelu(A x)) + V gelu(U x) = W x + C gelu(D x)    C = [W B | V], D = [A; U]

`offset` [H] is an optional learned stand-in for what the layers between will add. One program per block of rows of [W; D] and
token: it reads the whole residual, so it knows the norm's scale without a launch of its own. The token's last program adds the
correction, which is a few hundred wide, and chooses.

Bytes: (E + R) * H by many programs, then E * R by one per token, R = the ranks of both corrections. FLOPs: twice the weights.
All arithmetic is in fp32; a model that rounds its norm or its logits to bf16 may order near-ties otherwise.
Source: SpecPrefetch, arXiv 2607.24787.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import gelu as torch_gelu

from kernels.compile_case import SHORT_NAMES, CompileCase, Expectations
from kernels.gelu import gelu
from kernels.guesses import Guesses, guesses_reference, write_guesses
from kernels.integers import cdiv, next_power_of_2
from kernels.launch import FLOAT_DTYPES, Launch, check_aligned, check_at_most, check_launchable, check_tensor
from kernels.selection import check_arrivals, last_to_arrive

MAX_RANK = 1024
NUM_WARPS = 8
TILE = 16_384  # weights of the correction in flight: 64 a thread


@dataclass(frozen=True)
class CorrectedGateHead:
    """One target layer's weights, as the kernel reads them. `folded` makes one from the router and its corrections.

    Raises:
        KernelInputError: shapes or dtypes that do not belong together.
    """

    norm: Tensor  # [H], the norm's weight; Gemma's and Qwen3.5's, which multiply by 1 + weight, with the 1 added
    epsilon: float  # of the norm
    entry: Tensor  # [E + R, H]: W, then D
    correction: Tensor  # [E, R]: C
    offset: Tensor | None = None  # [H]

    def __post_init__(self) -> None:
        device, dtype = self.entry.device, [self.entry.dtype]
        check_tensor("correction", self.correction, [None, None], dtype, device)
        check_tensor("entry", self.entry, [self.n_experts + self.rank, None], FLOAT_DTYPES, device)
        check_tensor("norm", self.norm, [self.hidden], FLOAT_DTYPES, device)
        if self.offset is not None:
            check_tensor("offset", self.offset, [self.hidden], FLOAT_DTYPES, device)
        check_at_most("rank", self.rank, "the kernel's limit", MAX_RANK)
        check_aligned("entry", self.entry)

    @property
    def n_experts(self) -> int:
        return int(self.correction.shape[0])

    @property
    def rank(self) -> int:
        """R, of both corrections together."""
        return int(self.correction.shape[1])

    @property
    def hidden(self) -> int:
        return int(self.entry.shape[1])

    @classmethod
    def folded(
        cls,
        norm: Tensor,
        epsilon: float,
        router: Tensor,
        adapter: tuple[Tensor, Tensor],
        head: tuple[Tensor, Tensor],
        offset: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> CorrectedGateHead:
        """Multiply the adapter's way back into the router, in float64.

        Args:
            norm: [H]; epsilon: the norm's; router: W [E, H].
            adapter: A [rank, H] and B [H, rank]; head: U [width, H] and V [E, width].
            offset: [H], added to the residual.
            dtype: of the folded matrices.
        """
        entry = torch.cat([router.to(dtype), adapter[0].to(dtype), head[0].to(dtype)])
        correction = torch.cat([router.double() @ adapter[1].double(), head[1].double()], dim=1)
        return cls(norm, epsilon, entry, correction.to(dtype), offset)


@dataclass(frozen=True)
class CorrectedGateCall:
    """Arguments of one prediction, T tokens.

    Args:
        head: the target layer's weights.
        residual: [T, H], the stream before this layer's pre-MoE norm, any of the float dtypes.
        threshold: guesses with smaller logits are withheld.

    Raises:
        KernelInputError: what the kernel could not read rightly.
    """

    head: CorrectedGateHead
    residual: Tensor
    threshold: float = -torch.inf

    def __post_init__(self) -> None:
        check_tensor("residual", self.residual, [None, self.head.hidden], FLOAT_DTYPES, self.head.entry.device)
        check_at_most("tokens", self.n_tokens, "CUDA's limit on a grid's second axis", 65_535)
        check_aligned("residual", self.residual)

    @property
    def n_tokens(self) -> int:
        return int(self.residual.shape[0])

    def new_result(self, n_guesses: int) -> Guesses:
        """Memory for `n_guesses` guesses a token."""
        return Guesses.empty(self.n_tokens, self.head.n_experts, n_guesses, self.residual.device)


def predict_corrected_gate(call: CorrectedGateCall, out: Guesses, arrivals: Tensor | None = None) -> Guesses:
    """Predict, in one launch.

    Args:
        call: what to compute.
        out: where to write it (`call.new_result(m)`).
        arrivals: int32 zeros, at least one a token, left at zero: share them between the calls of a stream. By default new ones.

    Returns:
        `out`.

    Raises:
        KernelInputError: `out` or `arrivals` do not fit, or this machine cannot run the kernel; nothing has been launched then.
    """
    arrivals = torch.zeros(call.n_tokens, dtype=torch.int32, device=call.residual.device) if arrivals is None else arrivals
    launch = corrected_gate_launch(call, out, arrivals)
    check_launchable(call.residual.device)
    launch.run()
    return out


def predict_corrected_gate_reference(call: CorrectedGateCall, n_guesses: int, dtype: torch.dtype = torch.float32) -> Guesses:
    """The same in PyTorch from the folded weights, all arithmetic and float results in `dtype`."""
    head, residual = call.head, call.residual.to(dtype)
    residual = residual if head.offset is None else residual + head.offset.to(dtype)
    scale = (residual.square().mean(-1, keepdim=True) + head.epsilon).rsqrt()
    entries = (residual * scale * head.norm.to(dtype)) @ head.entry.to(dtype).T
    gate, inner = entries[:, : head.n_experts], torch_gelu(entries[:, head.n_experts :])
    return guesses_reference(gate + inner @ head.correction.to(dtype).T, n_guesses, call.threshold)


def corrected_gate_launch(call: CorrectedGateCall, out: Guesses, arrivals: Tensor) -> Launch:
    """The launch, checked and not yet run."""
    out.check(call.n_tokens, call.head.n_experts, call.residual.device)
    check_arrivals(arrivals, call.n_tokens, call.residual.device)
    head, n_rows = call.head, call.head.entry.shape[0]
    wide = max(16, next_power_of_2(head.rank))
    rows = 4 if n_rows * call.n_tokens >= 1024 else 2
    return Launch(
        _predict_kernel,
        (cdiv(n_rows, rows), call.n_tokens),
        {
            **out.arguments(call.threshold, NUM_WARPS),
            "residual_ptr": call.residual,
            "offset_ptr": head.offset,
            "norm_ptr": head.norm,
            "entry_ptr": head.entry,
            "correction_ptr": head.correction,
            "state_ptr": torch.empty(call.n_tokens, n_rows, device=call.residual.device),
            "arrivals_ptr": arrivals,
            "n_rows": n_rows,
            "rank": head.rank,
            "epsilon": float(head.epsilon),
            "HIDDEN": head.hidden,
            "ROWS": rows,
            "COLUMNS": min(2048, next_power_of_2(head.hidden)),
            "WIDTH": wide,
            "CHUNK": min(TILE // wide, next_power_of_2(head.n_experts)),
        },
        num_warps=NUM_WARPS,
    )


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: both corrections of rank 64, at Qwen3-30B-A3B's size."""
    hidden, n_experts, rank = 2048, 128, 128
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        norm = torch.empty(hidden, dtype=dtype, device="meta")
        entry, correction = norm.new_empty(n_experts + rank, hidden), norm.new_empty(n_experts, rank)
        head = CorrectedGateHead(norm, 1e-6, entry, correction, offset=norm)
        for n_tokens in (1, 8):
            call = CorrectedGateCall(head, norm.new_empty(n_tokens, hidden))
            launch = corrected_gate_launch(call, call.new_result(16), norm.new_empty(n_tokens, dtype=torch.int32))
            name = f"Qwen3-30B-A3B T={n_tokens} {SHORT_NAMES[dtype]}"
            cases.append(CompileCase(name, launch, Expectations(wide_loads=True)))
    return cases


@triton.jit
def _predict_kernel(  # type: ignore[no-untyped-def]
    residual_ptr, offset_ptr, norm_ptr, entry_ptr, correction_ptr, state_ptr, arrivals_ptr,
    logits_ptr, guess_ids_ptr, guess_scores_ptr,
    n_rows, rank, epsilon, n_experts, n_guesses, threshold,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, COPIES: tl.constexpr,
    LANES: tl.constexpr, GUESSES: tl.constexpr,
):  # fmt: skip
    """ROWS entries of one token's [W; D] x; in the token's last program, the correction and the choice."""
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, HIDDEN, COLUMNS):
        inside = first + column < HIDDEN
        residual = tl.load(residual_ptr + token * HIDDEN + first + column, mask=inside, other=0).to(tl.float32)
        if offset_ptr is not None:
            residual += tl.load(offset_ptr + first + column, mask=inside, other=0).to(tl.float32)
        squares += residual * residual
        x = residual * tl.load(norm_ptr + first + column, mask=inside, other=0).to(tl.float32)
        entry_ptrs = entry_ptr + row[:, None] * HIDDEN + first + column[None, :]
        products += tl.load(entry_ptrs, mask=(row < n_rows)[:, None] & inside[None, :], other=0).to(tl.float32) * x[None, :]
    entries = tl.sum(products, axis=1) * tl.rsqrt(tl.sum(squares, axis=0) / HIDDEN + epsilon)
    state_ptr += token * n_rows
    tl.store(state_ptr + row, tl.where(row < n_experts, entries, gelu(entries)), mask=row < n_rows)
    if not last_to_arrive(arrivals_ptr + token, tl.num_programs(0)):
        return

    wide = tl.arange(0, WIDTH)
    inner = tl.load(state_ptr + n_experts + wide, mask=wide < rank, other=0)
    for first in range(0, n_experts, CHUNK):
        target = first + tl.arange(0, CHUNK)
        target_inside = target < n_experts
        correction_ptrs = correction_ptr + target[:, None] * rank + wide[None, :]
        correction = tl.load(correction_ptrs, mask=target_inside[:, None] & (wide < rank)[None, :], other=0).to(tl.float32)
        gate = tl.load(state_ptr + target, mask=target_inside, other=0)
        tl.store(
            logits_ptr + token * n_experts + target, gate + tl.sum(correction * inner[None, :], axis=1), mask=target_inside
        )
    write_guesses(
        token, logits_ptr, guess_ids_ptr, guess_scores_ptr, n_experts, n_guesses, threshold, CHUNKS, COPIES, LANES, GUESSES
    )
