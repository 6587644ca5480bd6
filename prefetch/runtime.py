"""The offload runtime: one MoE layer call, from the router's choice to the weighted sum of its experts.

`OffloadRuntime.layer_call` is the method of this project in one screen: look up, demand, predict, plan, compute what is
present, wait, compute what arrived, record. It holds no policy of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from predictors.base import Prediction, Predictor
from predictors.lookahead import layers_ahead
from predictors.none import NoPredictor
from prefetch.compute.base import ExpertCompute, LayerCompute, Routed
from prefetch.dispatch import dispatch
from prefetch.errors import GatecastError, RoutingError, TransferError
from prefetch.fast_tier import Demand, FastTier, LookUp
from prefetch.geometry import ExpertKey, MoEGeometry
from prefetch.layer_server import LayerServer
from prefetch.planner.base import FastTierView, Planner
from prefetch.recorder import CallTimer, Recorder, RunRecord

log = logging.getLogger(__name__)

ReadExpert = Callable[[ExpertKey], tuple[Tensor, Tensor]]  # (gate_up [2I, H], down [H, I]) straight from the backing tier


class OffloadRuntime(LayerServer):
    """Serves the MoE layers of one model out of a fast tier that need not hold all experts.

    Args:
        geometry: sizes of the routed part of the model.
        tier: slots, cache members and transfers.
        predictor: guesses coming experts; a hint only.
        planner: turns guesses into prefetches, and leaves misses in place that are better computed there.
        read_expert: an expert's weights in the backing tier, for those misses.
        compute: who computes experts.
        clock: gives the present in seconds; the transfers' times are of the same clock.
    """

    def __init__(
        self,
        geometry: MoEGeometry,
        tier: FastTier,
        predictor: Predictor,
        planner: Planner,
        read_expert: ReadExpert,
        compute: ExpertCompute,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.compute, self.clock = compute, clock
        predicts_on = self.compute.device if predictor.on_device else torch.device("cpu")
        super().__init__(geometry, predictor, predicts_on, self.compute.device)
        self.tier, self.planner, self.read_expert = tier, planner, read_expert
        self.recorder = Recorder(geometry, clock)
        self.keys = [[ExpertKey(layer, e) for e in range(geometry.n_experts)] for layer in range(geometry.n_layers)]
        self.early_s = 0.0  # spent on predicting before the attention of the layer in progress
        planner.bind(geometry)

    def begin_forward(self, token_ids: Tensor, *, new_sequence: bool) -> None:
        super().begin_forward(token_ids, new_sequence=new_sequence)
        self.tier.sequence, self.tier.step = self.sequence, self.step
        self.recorder.begin_forward(self.sequence, self.step, self.token_ids.cpu())

    def end_forward(self) -> None:
        """The forward pass is over, on the device too: without its last layer's experts and the head a prompt would seem quicker."""
        self.compute.wait()
        self.recorder.end_forward()

    def before_attention(self, layer: int, pre_attention: Tensor) -> None:
        """Predict where that is asked for, from `pre_attention` [T, H], what the layer's attention reads.

        The time is counted in the layer call that follows, as if it had begun that much earlier.
        """
        super().before_attention(layer, pre_attention)
        if not self.predictor.before_attention or self._nothing_to_prefetch():
            return
        started = self.clock()
        seen = self.attention_view(layer)
        predictions = self._guarded(lambda: self._checked(self.predictor.predict_before_attention(seen)), layer)
        self._prefetch(predictions, layer, [], before_attention=True)
        self.early_s = self.clock() - started

    def layer_call(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The MoE layer's output [T, H].

        Args:
            layer: MoE layer index.
            hidden: [T, H], the router's input.
            topk_ids: [T, k] int64, what the router selected; `topk_weights`: [T, k].

        Raises:
            RoutingError: the router's weights are not finite.
            TransferError: a needed expert could not be read.
        """
        guesses = self._predict_beside_the_router(layer, hidden, topk_ids, topk_weights)
        ids, weights, guesses = self._await_router(topk_ids, topk_weights, guesses)
        timer = CallTimer(self.clock() - self.early_s, predictor_s=self.early_s)
        self.early_s = 0.0
        with self.compute.span(f"experts of layer {layer}"):
            self._check_routing(layer, weights)
            self.recorder.routed(ids, weights)
            work = dispatch(ids)

            found = self._look_up(layer, work.experts)
            try:
                waiting = self.tier.start(found.misses)
                self._predict_and_prefetch(layer, hidden, ids, weights, guesses, work.experts, timer)
                started = self.clock()
                call = self.compute.begin(
                    layer, Routed(hidden, topk_ids, topk_weights, weights, work, self.forms[layer]), found.in_place
                )
                timer.expert_s += self.clock() - started
                self._compute(call, found.hits, timer)
                for key in found.transient_hits:
                    self.tier.release(key)
                self._compute_in_place(call, found.in_place, timer)
                self._compute_as_they_arrive(call, found.late + found.misses, waiting, timer)

                started = self.clock()
                out = call.finish()
                ended = self.clock()
                timer.expert_s += ended - started
            except BaseException:
                with suppress(TransferError):  # after a GPU's fault each call reports it again: what led here is what counts
                    self.tier.abandon(found)
                raise
        self.recorder.called(layer, len(hidden), _counts(found), timer, ended)
        return out

    def _predict_beside_the_router(
        self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> list[Prediction] | None:
        """Enqueue the predictor where experts are computed by enqueueing and it computes there too, unless its heads have spoken with
        the router: its scores then come with the router's choice, in one wait. None: it is asked later, while demand loads travel."""
        heard = self.heard.pop(layer, None)
        if (heard is None and not (self.compute.enqueues and self.predictor.on_device)) or self._nothing_to_prefetch():
            return None
        if heard is not None:
            return heard
        started = self.clock()
        seen = self.layer_view(layer, hidden, topk_ids, topk_weights)
        guesses = self._guarded(lambda: self._well_formed(self.predictor.predict(seen)), layer)
        self.early_s += self.clock() - started
        return guesses

    def _await_router(
        self, topk_ids: Tensor, topk_weights: Tensor, guesses: list[Prediction] | None
    ) -> tuple[Tensor, Tensor, list[Prediction] | None]:
        """Choice, weights and guesses on the host. On a GPU this waits until the router has spoken, which is no cost of this call."""
        scores = [guess.scores for guess in guesses or []]
        ids, weights, *scores = self.compute.to_host([topk_ids, topk_weights, *scores])
        if guesses:
            guesses = [replace(guess, scores=there) for guess, there in zip(guesses, scores, strict=True)]
        return ids, weights, guesses

    def _check_routing(self, layer: int, topk_weights: Tensor) -> None:
        total = float(topk_weights.sum())
        if total != total or total in (float("inf"), float("-inf")):
            raise RoutingError(
                f"the router of MoE layer {layer} gave weights that are not finite (sequence {self.sequence}, step {self.step}): "
                "the hidden states hold NaN or Inf; check the checkpoint's weights and dtype"
            )

    def _look_up(self, layer: int, needed: list[int]) -> LookUp:
        keys = self.keys[layer]
        return self.tier.look_up(
            layer, [keys[e] for e in needed], lambda absent: self.planner.leave_in_place(absent, self._tier_view())
        )

    def _tier_view(self) -> FastTierView:
        tier = self.tier
        return FastTierView(tier.on_board, tier.prefetch_room, tier.transfers.queued_bytes, tier.useful_share, tier.consider)

    def _predict_and_prefetch(
        self,
        layer: int,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        guesses: list[Prediction] | None,
        computing: Sequence[int],
        timer: CallTimer,
    ) -> None:
        """While the demand loads travel: ask the predictor unless it has been, record its guesses, start what the planner chooses."""
        if type(self.predictor) is NoPredictor or self._nothing_to_prefetch():
            return
        started = self.clock()
        if guesses is None:
            seen = self.layer_view(layer, hidden, ids, weights)
            predictions = self._guarded(lambda: self._checked(self.predictor.predict(seen)), layer)
        else:
            predictions = self._guarded(lambda: self._checked(guesses), layer)
        self._prefetch(predictions, layer, computing)
        timer.predictor_s += self.clock() - started

    def _nothing_to_prefetch(self) -> bool:
        """With every expert on board predicting would only cost time."""
        return self.tier.holds_everything and not self.predictor.sees_every_call

    def _prefetch(
        self, predictions: list[Prediction], layer: int, computing: Sequence[int], *, before_attention: bool = False
    ) -> None:
        """Record guesses made at `layer`, whose experts `computing` are in use, and start what the planner chooses."""
        ahead = partial(layers_ahead, layer, n_layers=self.geometry.n_layers, before_attention=before_attention)
        for prediction in predictions:
            self.recorder.guessed(prediction, ahead(prediction.layer), self.tier.pool.slots_of(prediction.layer))
        planned = self.planner.plan(predictions, self._tier_view()) if predictions else []
        if planned:
            in_use = {self.keys[layer][e] for e in computing}
            for key in planned:
                self.tier.stage(key, ahead(key.layer), in_use)

    def _guarded(self, predict: Callable[[], list[Prediction]], layer: int) -> list[Prediction]:
        """A prediction is a hint: one that fails must not stop the run. It is reported once and switched off."""
        try:
            return predict()
        except GatecastError:
            raise  # the user's mistake, such as an oracle's trace of another run: a comparison without it would mislead
        except Exception as error:  # whatever a plug-in raises
            log.warning(
                "predictor %s failed at MoE layer %d (%s: %s): going on without prefetch",
                type(self.predictor).__name__, layer, type(error).__name__, error,
            )  # fmt: skip
            self.predictor = NoPredictor()
            return []

    def _well_formed(self, predictions: list[Prediction]) -> list[Prediction]:
        """`predictions`, of layers and shapes that exist."""
        for prediction in predictions:
            _check_shape(prediction, len(self.token_ids), self.geometry)
        return predictions

    def _checked(self, predictions: list[Prediction]) -> list[Prediction]:
        """`predictions` on the host, well formed and without NaN."""
        on_host = [p if p.scores.is_cpu else replace(p, scores=p.scores.cpu()) for p in self._well_formed(predictions)]
        for prediction in on_host:
            peak = float(prediction.scores.max())  # NaN if any score is
            if peak != peak:
                raise ValueError("scores hold NaN")
        return on_host

    def _compute(self, call: LayerCompute, keys: list[ExpertKey], timer: CallTimer) -> None:
        started = self.clock()
        call.from_slots(keys, [self.tier.slots[key] for key in keys])
        timer.expert_s += self.clock() - started

    def _compute_in_place(self, call: LayerCompute, keys: list[ExpertKey], timer: CallTimer) -> None:
        if not keys:
            return
        started, stalled_s = self.clock(), timer.stall_s
        call.in_place(keys, lambda key: self._read(key, timer))
        timer.expert_s += self.clock() - started - (timer.stall_s - stalled_s)

    def _read(self, key: ExpertKey, timer: CallTimer) -> tuple[Tensor, Tensor]:
        started = self.clock()
        weights = self.read_expert(key)
        timer.stall_s += self.clock() - started
        return weights

    def _compute_as_they_arrive(
        self, call: LayerCompute, demands: list[Demand], waiting: list[Demand], timer: CallTimer
    ) -> None:
        """Wait for transfers and compute each expert as it comes; a transient's slot goes to the next one waiting."""
        pending = {d.record.transfer: d for d in demands if d.record is not None}
        self._expect(call, [demand.key for demand in pending.values()], timer)
        while pending:
            started = self.clock()
            settled = self.tier.transfers.wait_any(list(pending))
            timer.stall_s += self.clock() - started
            for transfer in settled:
                demand, error = pending.pop(transfer), transfer.error
                if error is not None:
                    where = f"expert {demand.key.expert} of MoE layer {demand.key.layer}"
                    raise TransferError(f"{where} could not be loaded: {error}") from error
                self.tier.arrived(demand)
                self._compute(call, [demand.key], timer)
                if demand.transient:
                    self.tier.release(demand.key)
            if waiting:
                started_now, waiting = waiting, self.tier.start(waiting)
                pending |= {d.record.transfer: d for d in started_now if d.record is not None}

    def _expect(self, call: LayerCompute, keys: list[ExpertKey], timer: CallTimer) -> None:
        if keys:
            started = self.clock()
            call.expect(keys, [self.tier.slots[key] for key in keys])
            timer.expert_s += self.clock() - started

    def finish(self) -> None:
        """End of the run: settle all prefetches, so that every byte has an outcome."""
        self.tier.finish()

    def record(self) -> RunRecord:
        """The run's tables, once it has finished."""
        return self.recorder.record(self.tier.records)

    def close(self) -> None:
        """Stop the transfers. The runtime cannot be used again."""
        self.tier.transfers.close()


def _counts(found: LookUp) -> tuple[int, int, int, int, int]:
    n_hits, n_late, n_in_place = len(found.hits), len(found.late), len(found.in_place)
    n_misses = len(found.misses) + n_in_place
    return n_hits + n_late + n_misses, n_hits, n_late, n_misses, n_in_place


def _check_shape(prediction: Prediction, n_tokens: int, geometry: MoEGeometry) -> None:
    scores = prediction.scores
    if not 0 <= prediction.layer < geometry.n_layers:
        raise ValueError(f"predicted layer {prediction.layer} of {geometry.n_layers}")
    if scores.shape not in ((n_tokens, geometry.n_experts), (1, geometry.n_experts)):
        raise ValueError(f"scores of shape {tuple(scores.shape)}, expected ({n_tokens} or 1, {geometry.n_experts})")
