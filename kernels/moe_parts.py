"""The expert part of an MoE layer in parts: experts that are there now, the others as they arrive, one result.

What is computed for a (token, expert) pair depends neither on the part that it is in nor on the others in it, and the sum over a
token's experts is taken at the end, in one fixed order: two ways to cut a call give the same bits. An expert may leave its slot as
soon as its part is enqueued and the slot's next writer waits for the stream.

A part brings its own table and ids, as the host made them. With few tokens a part is two launches over its pairs alone, and nothing
is checked that the last call of the same sizes has shown to be right.

Beside `moe_mlp`, each pair's output goes to memory and back once, 2 * T * k * H elements, in one launch more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.decode_mlp import decode_launches
from kernels.decode_quantised import quantised_launches
from kernels.expert_form import PLAIN, ExpertForm
from kernels.grouped_mlp import combine_launch, empty_rows, rows_launches
from kernels.launch import ALIGNMENT_BYTES, check_launchable
from kernels.moe_call import MoECall
from kernels.moe_mlp import choose_path
from kernels.quantised_experts import QuantisedTable
from kernels.repeated_launch import RepeatedLaunch
from kernels.slot_table import ExpertTable

# As `top_k`: more than a call's pairs, so that each of them is of token 0; one number, so that one compiled kernel serves.
MANY = 1 << 16


class Part(NamedTuple):
    """Some pairs of a call, whose experts are there. Pair p is rank p % k of token p // k. Tensors are on the device, their starts aligned."""

    table: Tensor  # int64 [E], the address of each expert's row; only those of `ids` are read
    ids: Tensor  # int64 [n or more], the pairs' experts
    pairs: Tensor  # int64 [n or more]
    tokens: Tensor  # int64 [n or more], of the pairs
    n_pairs: int
    first: int | None  # the pairs are first, first + 1, ...; None: they are not


class PartKernels:
    """What the layer calls of a run have in common.

    Args:
        table: by address, one layer. Its entries are written where parts need a table of the kernels' own.
        missed: int32 [1], set to 1 where an expert was absent from the table when its part was computed.

    Raises:
        KernelInputError: this machine cannot run the kernels.
    """

    def __init__(self, table: ExpertTable, missed: Tensor):
        check_launchable(table.entries.device)
        self.table, self.missed = table, missed
        self._decoding: dict[tuple, DecodeKernels] = {}

    def begin(self, x: Tensor, ids: Tensor, weights: Tensor, form: ExpertForm = PLAIN) -> MoEParts:
        """A call begins; arguments are `MoECall`'s, and the form of the layer's experts, on their device.

        Raises:
            KernelInputError: they do not fit.
        """
        kind = x.shape, x.dtype, x.device, ids.shape, ids.dtype, weights.dtype, form.activation, form.has_biases
        known = self._decoding.get(kind)
        if known is None or not (_can_be_read(x) and ids.is_contiguous() and weights.is_contiguous()):
            call = MoECall(x, ids, weights, self.table, 0, *form.parts)
            if choose_path(call.n_tokens, self.table.n_experts, call.top_k) == "grouped":
                return GroupedParts(call, self.missed)
            known = self._decoding[kind] = DecodeKernels(call, self.missed)
        return DecodedParts(known, x, ids, weights, form)


class MoEParts(ABC):
    """One layer call in progress.

    Attributes:
        rows: [T * k, H], each pair's output, weighted and summed at the end.
    """

    rows: Tensor

    @abstractmethod
    def add(self, part: Part) -> None:
        """Compute a part's pairs."""

    @abstractmethod
    def finish(self, shared: Tensor | None = None) -> Tensor:
        """The layer's output [T, H], once every pair has been in a part or left out; `shared` [T, H] is added in fp32, before the rounding."""

    def leave_out(self, pairs: Tensor) -> None:
        """`pairs`, int64 [n] on the device, contribute nothing: somebody else computes them."""
        self.rows.index_fill_(0, pairs, 0)


class GroupedParts(MoEParts):
    """For many tokens. A part is the whole call without its other pairs: a tile's size must not depend on the part."""

    def __init__(self, call: MoECall, missed: Tensor):
        self.call, self.missed, self.rows = call, missed, empty_rows(call)

    def add(self, part: Part) -> None:
        pairs, ids = part.pairs[: part.n_pairs], torch.full_like(self.call.ids, -1)
        ids.view(-1).index_copy_(0, pairs, part.ids[: part.n_pairs].to(ids.dtype))
        self.call.table.entries[0].copy_(part.table)
        for launch in rows_launches(replace(self.call, ids=ids), self.rows, self.missed):
            launch.run()

    def finish(self, shared: Tensor | None = None) -> Tensor:
        call, out = replace(self.call, shared=shared), torch.empty_like(self.call.x)
        combine_launch(call, self.rows, out, self.missed).run()
        return out


class DecodeKernels:
    """The launches of calls with the same few tokens, checked.

    Args:
        call: one of them.
        missed: as for `PartKernels`.
    """

    def __init__(self, call: MoECall, missed: Tensor):
        self.table, self.missed = call.table, missed
        self.inner, self.n_pairs = call.table.geometry.intermediate, call.n_pairs
        self.rows_are_aligned = call.x.shape[1] * call.x.element_size() % ALIGNMENT_BYTES == 0
        one = call.ids.new_zeros(1, 1, dtype=torch.int64)  # a pair is a token with one expert
        pair = replace(call, x=call.x[:1], ids=one, weights=torch.ones_like(one, dtype=torch.float32))
        launches_of = quantised_launches if isinstance(call.table, QuantisedTable) else decode_launches
        gate_up, down = launches_of(pair, torch.empty_like(pair.x), missed)
        x_of_pair = {"top_k": MANY} if call.n_tokens == 1 else {}
        unweighted = {"weights_ptr": torch.ones(call.n_pairs, dtype=torch.float32, device=call.x.device)}
        self.gate_up = RepeatedLaunch(replace(gate_up, arguments={**gate_up.arguments, **x_of_pair}))
        self.down = RepeatedLaunch(replace(down, arguments={**down.arguments, **unweighted}))
        self.combine = RepeatedLaunch(combine_launch(call, empty_rows(call), torch.empty_like(call.x), missed))


class DecodedParts(MoEParts):
    """For few tokens: two launches over a part's pairs."""

    def __init__(self, kernels: DecodeKernels, x: Tensor, ids: Tensor, weights: Tensor, form: ExpertForm):
        self.kernels, self.x, self.ids, self.weights = kernels, x, ids, weights
        _, *biases = form.parts
        self.gate_up_bias, self.down_bias = ({} if bias is None else {"bias_ptr": bias} for bias in biases)
        self.rows = x.new_empty(kernels.n_pairs, x.shape[1])
        self.y = x.new_empty(kernels.n_pairs, kernels.inner)  # of one part after the other

    def add(self, part: Part) -> None:
        n_pairs, first = part.n_pairs, part.first if self.kernels.rows_are_aligned else None
        x = self.x if len(self.x) == 1 else self.x.index_select(0, part.tokens[:n_pairs])
        out = self.x.new_empty(n_pairs, x.shape[1]) if first is None else self.rows[first : first + n_pairs]
        where = {"entries_ptr": part.table, "ids_ptr": part.ids, "y_ptr": self.y}
        self.kernels.gate_up.run(n_pairs, {**where, **self.gate_up_bias, "x_ptr": x})
        self.kernels.down.run(n_pairs, {**where, **self.down_bias, "out_ptr": out})
        if first is None:
            self.rows.index_copy_(0, part.pairs[:n_pairs], out)

    def finish(self, shared: Tensor | None = None) -> Tensor:
        kernels, out = self.kernels, torch.empty_like(self.x)
        if shared is None:
            tensors = {"rows_ptr": self.rows, "ids_ptr": self.ids, "weights_ptr": self.weights, "out_ptr": out}
            kernels.combine.run(kernels.combine.launch.grid[1], tensors)
        else:
            call = MoECall(self.x, self.ids, self.weights, kernels.table, layer=0, shared=shared)
            combine_launch(call, self.rows, out, kernels.missed).run()
        return out


def _can_be_read(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0
