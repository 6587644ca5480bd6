"""A small network that predicts a coming layer's experts (PreScope's head, `predictors/prescope.py`), in one launch.

With x the router's input, ids and w this layer's routing, W_h = W1's columns for the projected state, and so on:

    v = gelu(entry[:width] @ x + sum_j (routing[0, ids_j] + w_j * routing[1, ids_j]) + b)       entry[:width] = W_h P^T
    s = sigmoid(entry[width:] @ x + b)                                                          entry[width:] = Wg P^T
    v = v + s * (W3 gelu(W2 v + b2) + b3)                                                       (s and this line: middle form)
    logits = W4 v + b4 (+ prior)

The projection P is folded into the two matrices that read it, which makes the first stage one matrix-vector product over many
programs; the multi-hot routing features become a gather of k rows. The last program to finish a token does the rest, whose
matrices are a few hundred wide: spreading them out would cost more in waiting than it gains in bandwidth.

Bytes: 2 * width * H, then 2 * width^2 + E * width by one program per token. FLOPs: twice the weights.
Source: PreScope / LayerScope, arXiv 2509.23638.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor
from torch.nn.functional import gelu as torch_gelu

from kernels.compile_case import SHORT_NAMES, CompileCase, Expectations
from kernels.gelu import gelu
from kernels.guesses import Guesses, guesses_reference, write_guesses
from kernels.integers import cdiv, next_power_of_2
from kernels.launch import FLOAT_DTYPES, Launch, check_aligned, check_at_most, check_launchable, check_tensor
from kernels.selection import check_arrivals, last_to_arrive
from prefetch.errors import KernelInputError

MAX_WIDTH = 1024  # a program holds one vector of it in registers, beside a tile of the matrices
NUM_WARPS = 8
TILE_BYTES = {2: 32_768, 4: 16_384}  # of each matrix in flight, by the bytes of a weight: fp32 spills with more


@dataclass(frozen=True)
class ResidualBlock:
    """W2, b2, W3, b3 of the middle form."""

    enter: Tensor  # [width, width], like the head's entry
    enter_bias: Tensor  # float32 [width]
    leave_transposed: Tensor  # [width in, width out]
    leave_bias: Tensor  # float32 [width]


@dataclass(frozen=True)
class MlpHead:
    """One head's weights, as the kernel reads them. `folded` makes one from a network's own.

    Raises:
        KernelInputError: shapes or dtypes that do not belong together.
    """

    entry: Tensor  # [width, H], or [2 * width, H] with a block: rows of v, then of its gate s
    entry_bias: Tensor  # float32, one a row
    routing: Tensor  # [2, E, width]: what a selected expert adds to v's rows, as such and per unit of its weight
    leave: Tensor  # [E, width]
    leave_bias: Tensor  # float32 [E]
    block: ResidualBlock | None = None

    def __post_init__(self) -> None:
        device, own, single = self.entry.device, [self.entry.dtype], [torch.float32]
        n_experts, width = self.routing.shape[1:]
        n_rows = width if self.block is None else 2 * width
        check_tensor("entry", self.entry, [n_rows, None], FLOAT_DTYPES, device)
        check_tensor("entry_bias", self.entry_bias, [n_rows], single, device)
        check_tensor("routing", self.routing, [2, n_experts, width], own, device)
        check_tensor("leave", self.leave, [n_experts, width], own, device)
        check_tensor("leave_bias", self.leave_bias, [n_experts], single, device)
        if self.block is not None:
            check_tensor("block.enter", self.block.enter, [width, width], own, device)
            check_tensor("block.enter_bias", self.block.enter_bias, [width], single, device)
            check_tensor("block.leave_transposed", self.block.leave_transposed, [width, width], own, device)
            check_tensor("block.leave_bias", self.block.leave_bias, [width], single, device)
        check_at_most("width", width, "the kernel's limit", MAX_WIDTH)
        check_aligned("entry", self.entry)

    @property
    def n_experts(self) -> int:
        return int(self.leave.shape[0])

    @property
    def width(self) -> int:
        return int(self.leave.shape[1])

    @property
    def hidden(self) -> int:
        return int(self.entry.shape[1])

    @classmethod
    def folded(
        cls,
        mean: Tensor,
        directions: Tensor,
        enter: tuple[Tensor, Tensor],
        leave: tuple[Tensor, Tensor],
        gate: tuple[Tensor, Tensor] | None = None,
        block: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> MlpHead:
        """Fold the projection (x - mean) @ directions into the layers that read it; products are formed in float64.

        Args:
            mean: [H]; directions: [H, rank].
            enter: weight [width, rank + 2E] and bias [width]: columns for the projection, the multi-hot and the gate weights.
            leave: weight [E, width] and bias [E].
            gate: weight [width, rank] and bias [width]; block: two layers of [width, width]; both or neither.
            dtype: of the matrices; biases stay float32.
        """
        rank, n_experts = directions.shape[1], leave[0].shape[0]
        if (gate is None) != (block is None):
            raise KernelInputError("gate and block come together: pass both or neither")
        readers = [(enter[0][:, :rank], enter[1])] + ([] if gate is None else [gate])
        entry = torch.cat([weight.double() @ directions.double().T for weight, _ in readers]).to(dtype)
        bias = torch.cat([bias.double() for _, bias in readers]) - entry.double() @ mean.double()
        return cls(
            entry=entry,
            entry_bias=bias.float(),
            routing=rearrange(enter[0][:, rank:], "width (kind e) -> kind e width", e=n_experts).to(dtype).contiguous(),
            leave=leave[0].to(dtype),
            leave_bias=leave[1].float(),
            block=None
            if block is None
            else ResidualBlock(
                block[0][0].to(dtype), block[0][1].float(), block[1][0].T.to(dtype).contiguous(), block[1][1].float()
            ),
        )


@dataclass(frozen=True)
class MlpCall:
    """Arguments of one prediction, T tokens.

    Args:
        head: the network.
        x: [T, H], the router's input, any of the float dtypes.
        topk_ids: int32 or int64 [T, k], this layer's routing; an id outside 0..E-1 adds nothing.
        topk_weights: fp32 [T, k].
        prior: fp32 [T, E] added to the logits, such as the coming router's own logits on `x` (`Routed.logits[1]`).
        threshold: guesses with smaller logits are withheld.

    Raises:
        KernelInputError: what the kernel could not read rightly.
    """

    head: MlpHead
    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    prior: Tensor | None = None
    threshold: float = -torch.inf

    def __post_init__(self) -> None:
        n_tokens, device = self.x.shape[0], self.head.entry.device
        check_tensor("x", self.x, [None, self.head.hidden], FLOAT_DTYPES, device)
        check_tensor("topk_ids", self.topk_ids, [n_tokens, None], [torch.int32, torch.int64], device)
        check_tensor("topk_weights", self.topk_weights, list(self.topk_ids.shape), [torch.float32], device)
        if self.prior is not None:
            check_tensor("prior", self.prior, [n_tokens, self.head.n_experts], [torch.float32], device)
        check_at_most("tokens", n_tokens, "CUDA's limit on a grid's second axis", 65_535)

    @property
    def n_tokens(self) -> int:
        return int(self.x.shape[0])

    def new_result(self, n_guesses: int) -> Guesses:
        """Memory for `n_guesses` guesses a token."""
        return Guesses.empty(self.n_tokens, self.head.n_experts, n_guesses, self.x.device)


def predict_mlp(call: MlpCall, out: Guesses, arrivals: Tensor | None = None) -> Guesses:
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
    arrivals = torch.zeros(call.n_tokens, dtype=torch.int32, device=call.x.device) if arrivals is None else arrivals
    launch = predict_launch(call, out, arrivals)
    check_launchable(call.x.device)
    launch.run()
    return out


def predict_mlp_reference(call: MlpCall, n_guesses: int, dtype: torch.dtype = torch.float32) -> Guesses:
    """The same in PyTorch from the folded weights, all arithmetic and float results in `dtype`."""
    head, block = call.head, call.head.block
    rows = call.x.to(dtype) @ head.entry.to(dtype).T + head.entry_bias.to(dtype)
    known = (call.topk_ids >= 0) & (call.topk_ids < head.n_experts)
    as_such, by_weight = head.routing.to(dtype)[:, torch.where(known, call.topk_ids, 0).long()]  # [T, k, width] each
    added = torch.where(known[..., None], as_such + call.topk_weights.to(dtype)[..., None] * by_weight, 0).sum(1)
    v = torch_gelu(rows[:, : head.width] + added)
    if block is not None:
        inner = torch_gelu(v @ block.enter.to(dtype).T + block.enter_bias.to(dtype))
        step = inner @ block.leave_transposed.to(dtype) + block.leave_bias.to(dtype)
        v = v + rows[:, head.width :].sigmoid() * step
    logits = v @ head.leave.to(dtype).T + head.leave_bias.to(dtype)
    logits = logits if call.prior is None else logits + call.prior.to(dtype)
    return guesses_reference(logits, n_guesses, call.threshold)


def predict_launch(call: MlpCall, out: Guesses, arrivals: Tensor) -> Launch:
    """The launch, checked and not yet run."""
    out.check(call.n_tokens, call.head.n_experts, call.x.device)
    check_arrivals(arrivals, call.n_tokens, call.x.device)
    head, block = call.head, call.head.block
    n_rows, wide = head.entry.shape[0], max(16, next_power_of_2(head.width))
    rows = 4 if n_rows * call.n_tokens >= 512 else 2  # one program a multiprocessor is resident: 512 rows in one wave
    return Launch(
        _predict_kernel,
        (cdiv(n_rows, rows), call.n_tokens),
        {
            **out.arguments(call.threshold, NUM_WARPS),
            "x_ptr": call.x,
            "topk_ids_ptr": call.topk_ids,
            "topk_weights_ptr": call.topk_weights,
            "prior_ptr": call.prior,
            "entry_ptr": head.entry,
            "entry_bias_ptr": head.entry_bias,
            "routing_ptr": head.routing,
            "block_enter_ptr": None if block is None else block.enter,
            "block_enter_bias_ptr": None if block is None else block.enter_bias,
            "block_leave_ptr": None if block is None else block.leave_transposed,
            "block_leave_bias_ptr": None if block is None else block.leave_bias,
            "leave_ptr": head.leave,
            "leave_bias_ptr": head.leave_bias,
            "state_ptr": torch.empty(call.n_tokens, n_rows, device=call.x.device),
            "arrivals_ptr": arrivals,
            "n_rows": n_rows,
            "n_units": head.width,
            "top_k": call.topk_ids.shape[1],
            "HIDDEN": head.hidden,
            "N_WIDTH": head.width,
            "RANKS": next_power_of_2(call.topk_ids.shape[1]),
            "ROWS": rows,
            "COLUMNS": min(2048, next_power_of_2(head.hidden)),
            "WIDTH": wide,
            "CHUNK": min(TILE_BYTES[head.entry.dtype.itemsize] // (wide * head.entry.dtype.itemsize), wide),
        },
        num_warps=NUM_WARPS,
    )


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: a middle head of 256, at Qwen3-30B-A3B's size."""
    return [_compile_case(dtype, n_tokens) for dtype in (torch.bfloat16, torch.float32) for n_tokens in (1, 8)]


def _compile_case(dtype: torch.dtype, n_tokens: int, hidden: int = 2048, n_experts: int = 128, width: int = 256) -> CompileCase:
    def meta(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    single = torch.float32
    square, bias = meta(width, width), meta(width, kind=single)
    head = MlpHead(
        meta(2 * width, hidden), meta(2 * width, kind=single), meta(2, n_experts, width),
        meta(n_experts, width), meta(n_experts, kind=single), ResidualBlock(square, bias, square, bias),
    )  # fmt: skip
    routed = meta(n_tokens, 8, kind=torch.int32), meta(n_tokens, 8, kind=single)
    call = MlpCall(head, meta(n_tokens, hidden), *routed, prior=meta(n_tokens, n_experts, kind=single))
    launch = predict_launch(call, call.new_result(16), meta(n_tokens, kind=torch.int32))
    name = f"Qwen3-30B-A3B T={n_tokens} {SHORT_NAMES[dtype]}"
    return CompileCase(name, launch, Expectations(max_registers=180, wide_loads=True))


@triton.jit
def _predict_kernel(  # type: ignore[no-untyped-def]
    x_ptr, topk_ids_ptr, topk_weights_ptr, prior_ptr, entry_ptr, entry_bias_ptr, routing_ptr,
    block_enter_ptr, block_enter_bias_ptr, block_leave_ptr, block_leave_bias_ptr, leave_ptr, leave_bias_ptr,
    state_ptr, arrivals_ptr, logits_ptr, guess_ids_ptr, guess_scores_ptr,
    n_rows, n_units, top_k, n_experts, n_guesses, threshold,
    HIDDEN: tl.constexpr, N_WIDTH: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, COPIES: tl.constexpr,
    LANES: tl.constexpr, GUESSES: tl.constexpr,
):  # fmt: skip
    """ROWS entries of one token's v and s; in the token's last program, all that follows.

    `n_units` is N_WIDTH, at run time: LLVM unrolls a loop whose length it knows until registers spill.
    """
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANKS)
    expert = tl.load(topk_ids_ptr + token * top_k + rank, mask=rank < top_k, other=-1)
    weight = tl.load(topk_weights_ptr + token * top_k + rank, mask=rank < top_k, other=0)
    routing_ptrs = routing_ptr + expert[:, None] * N_WIDTH + row[None, :]
    known = ((expert >= 0) & (expert < n_experts))[:, None] & (row < N_WIDTH)[None, :]
    added = tl.load(routing_ptrs, mask=known, other=0).to(tl.float32)
    by_weight = tl.load(routing_ptrs + n_experts * N_WIDTH, mask=known, other=0).to(tl.float32)
    entry_bias = tl.load(entry_bias_ptr + row, mask=row < n_rows, other=0)
    # All of that before the loop: it need not be waited for.
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, HIDDEN, COLUMNS):
        inside = first + column < HIDDEN
        x = tl.load(x_ptr + token * HIDDEN + first + column, mask=inside, other=0).to(tl.float32)
        entry_ptrs = entry_ptr + row[:, None] * HIDDEN + first + column[None, :]
        products += tl.load(entry_ptrs, mask=(row < n_rows)[:, None] & inside[None, :], other=0).to(tl.float32) * x[None, :]
    entries = tl.sum(products, axis=1) + entry_bias
    entries += tl.sum(tl.where(known, added + weight[:, None] * by_weight, 0.0), axis=0)
    activated = tl.where(row < N_WIDTH, gelu(entries), tl.sigmoid(entries))
    state_ptr += token * n_rows
    tl.store(state_ptr + row, activated, mask=row < n_rows)
    if not last_to_arrive(arrivals_ptr + token, tl.num_programs(0)):
        return

    wide = tl.arange(0, WIDTH)
    wide_inside = wide < N_WIDTH
    v = tl.load(state_ptr + wide, mask=wide_inside, other=0)
    if block_enter_ptr is not None:
        products = tl.zeros([CHUNK, WIDTH], tl.float32)
        for first in range(0, n_units, CHUNK):
            unit = first + tl.arange(0, CHUNK)
            at = unit[:, None] * N_WIDTH + wide[None, :]
            inside = (unit < N_WIDTH)[:, None] & wide_inside[None, :]
            enter = tl.load(block_enter_ptr + at, mask=inside, other=0).to(tl.float32)
            leave = tl.load(block_leave_ptr + at, mask=inside, other=0).to(tl.float32)
            bias = tl.load(block_enter_bias_ptr + unit, mask=unit < N_WIDTH, other=0)
            products += leave * gelu(tl.sum(enter * v[None, :], axis=1) + bias)[:, None]
        step = tl.sum(products, axis=0) + tl.load(block_leave_bias_ptr + wide, mask=wide_inside, other=0)
        v += tl.load(state_ptr + N_WIDTH + wide, mask=wide_inside, other=0) * step
    for first in range(0, n_experts, CHUNK):
        target = first + tl.arange(0, CHUNK)
        inside = (target < n_experts)[:, None] & wide_inside[None, :]
        leave = tl.load(leave_ptr + target[:, None] * N_WIDTH + wide[None, :], mask=inside, other=0).to(tl.float32)
        logits = tl.sum(leave * v[None, :], axis=1) + tl.load(leave_bias_ptr + target, mask=target < n_experts, other=0)
        if prior_ptr is not None:
            logits += tl.load(prior_ptr + token * n_experts + target, mask=target < n_experts, other=0)
        tl.store(logits_ptr + token * n_experts + target, logits, mask=target < n_experts)
    write_guesses(
        token, logits_ptr, guess_ids_ptr, guess_scores_ptr, n_experts, n_guesses, threshold, CHUNKS, COPIES, LANES, GUESSES
    )
