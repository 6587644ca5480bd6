"""The expert part of an MoE layer in parts: experts that are there now, the others as they arrive, one result.

What is computed for a (token, expert) pair depends neither on the part that it is in nor on the others in it, and the sum over a
token's experts is taken at the end, in routing order: two ways to cut a call give the same bits. An expert may leave its slot as
soon as its part is enqueued and the slot's next writer waits for the stream.

Beside `moe_mlp`, each pair's output goes to memory and back once, 2 * T * k * H elements, in one launch more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.grouped_mlp import combine_launch, empty_rows, rows_launches
from kernels.launch import check_launchable
from kernels.moe_call import MoECall
from kernels.moe_mlp import choose_path, moe_mlp


class MoEParts:
    """One layer call in progress.

    Args:
        call: what to compute, without `shared` and `residual`. Its table may change between parts.
        missed: int32 [1], set to 1 where an expert was absent from the table when its part was computed.

    Raises:
        KernelInputError: this machine cannot run the kernels.
    """

    def __init__(self, call: MoECall, missed: Tensor):
        self.call, self.missed = call, missed
        self.rows = empty_rows(call)
        self.decodes = choose_path(call.n_tokens, call.table.n_experts, call.top_k) == "decode"
        check_launchable(call.x.device)

    def add(self, pairs: Tensor) -> None:
        """Compute `pairs`, int64 [n] on the device: pair p is rank p % k of token p // k."""
        if self.decodes:
            self._decode(pairs)
        else:
            self._group(pairs)

    def leave_out(self, pairs: Tensor) -> None:
        """`pairs`, int64 [n] on the device, contribute nothing: somebody else computes them."""
        self.rows.index_fill_(0, pairs, 0)

    def finish(self, shared: Tensor | None = None) -> Tensor:
        """The layer's output [T, H], once every pair has been in a part or left out; `shared` [T, H] is added in fp32, before the rounding."""
        call, out = replace(self.call, shared=shared), torch.empty_like(self.call.x)
        call.check_outputs(out, self.missed)
        combine_launch(call, self.rows, out, self.missed).run()
        return out

    def _decode(self, pairs: Tensor) -> None:
        """As tokens with one expert each."""
        call = self.call
        ids = call.ids.view(-1, 1).index_select(0, pairs)
        x = call.x.index_select(0, pairs // call.top_k)
        part = replace(call, x=x, ids=ids, weights=torch.ones_like(ids, dtype=torch.float32))
        self.rows.index_copy_(0, pairs, moe_mlp(part, missed=self.missed, path="decode"))

    def _group(self, pairs: Tensor) -> None:
        """As the whole call without its other pairs: a tile's size must not depend on the part."""
        ids = torch.full_like(self.call.ids, -1)
        ids.view(-1).index_copy_(0, pairs, self.call.ids.view(-1).index_select(0, pairs))
        for launch in rows_launches(replace(self.call, ids=ids), self.rows, self.missed):
            launch.run()
