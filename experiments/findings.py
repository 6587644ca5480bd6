"""What is found out about one predictor: counts of its guesses per document and cache, calibration, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.judging import Judged, judge, samples
from experiments.residency import Snapshots, with_residency
from predictors.base import LayerView, ModelView, Predictor
from predictors.calibration import Calibration, Reliability, reliability
from predictors.evaluation import count_guesses
from predictors.learned import LearnedPredictor
from predictors.oracle import Oracle
from predictors.own_gate import OwnGate
from predictors.recording import RecordedDocument, Recording, joined
from prefetch.geometry import MoEGeometry

N_COSTED_CALLS = 64  # whose FLOPs are counted


@dataclass
class Courtroom:
    """What all predictors are judged on, prepared once."""

    recording: Recording
    model: ModelView
    geometry: MoEGeometry
    documents: dict[str, list[RecordedDocument]]  # split -> documents
    held: dict[str, dict[str, list[Snapshots]]]  # split -> cache -> per document
    calibration: list[RecordedDocument]  # for predictors that bring no calibration


@dataclass
class Findings:
    """Of one predictor."""

    counts: dict[str, pd.DataFrame]  # cache -> rows of `count_guesses` with predictor, split, document
    cost: dict[str, Any]  # see `cost`
    curves: dict[str, Reliability] = field(default_factory=dict)  # split -> reliability of P(used)


def examine(label: str, predictor: Predictor, court: Courtroom, calibration_method: str) -> Findings:
    """Judge `predictor` on all splits, from a fresh start each, and see what it costs.

    Raises:
        PredictorError, ConfigError, TraceError: it cannot be used with this model or recording, or it failed.
    """
    calibration = _calibration(predictor, court, calibration_method)
    counts: dict[str, list[pd.DataFrame]] = {}
    curves: dict[str, Reliability] = {}
    call_s: list[float] = []
    n_flops = 0.0
    for split, documents in court.documents.items():
        judged = _judged(predictor, court, documents)
        call_s += [seconds for one in judged for seconds in one.decode_call_s]
        n_flops = flops_per_call(predictor, _decode_views(court.recording, documents[0]))
        for cache, held in court.held[split].items():
            for document, one, snapshot in zip(documents, judged, held, strict=True):
                rows = count_guesses(with_residency(one.trace, snapshot))
                counts.setdefault(cache, []).append(rows.assign(predictor=label, split=split, document=document.name))
        if calibration is not None:
            curves[split] = _reliability(calibration, judged, court.geometry.top_k)
    whole = {cache: pd.concat(tables, ignore_index=True) for cache, tables in counts.items()}
    return Findings(whole, cost(label, predictor, n_flops, call_s), curves)


def cost(label: str, predictor: Predictor, n_flops: float, call_s: Sequence[float]) -> dict[str, Any]:
    """Parameters, FLOPs and time of a call with one token."""
    median_s, high_s = (np.quantile(call_s, q) if len(call_s) else np.nan for q in (0.5, 0.95))
    return {
        "predictor": label,
        "parameters": predictor.n_parameters(),
        "flops": n_flops,
        "call_us": 1e6 * float(median_s),
        "call_us_p95": 1e6 * float(high_s),
    }


def flops_per_call(predictor: Predictor, views: Sequence[LayerView]) -> float:
    """FLOPs of matrix products in a call that predicts, mean over `views`; a multiply-add is 2."""
    found = []
    predictor.start_sequence()
    for seen in views:
        with FlopCounterMode(display=False) as counter:
            early = predictor.predict_before_attention(seen.before_attention) if predictor.before_attention else []
            predicted = early + predictor.predict(seen)
        if predicted:
            found.append(counter.get_total_flops())
    return float(np.mean(found)) if found else 0.0


def _judged(predictor: Predictor, court: Courtroom, documents: Sequence[RecordedDocument]) -> list[Judged]:
    if isinstance(predictor, Oracle):
        predictor.use_trace(joined([court.recording.trace(document) for document in documents]))
    if isinstance(predictor, OwnGate):
        predictor.use_states(lambda sequence: court.recording.views(documents[sequence], sequence))
    predictor.bind(court.model)
    return list(judge(predictor, court.recording, documents, court.geometry))


def _calibration(predictor: Predictor, court: Courtroom, method: str) -> Calibration | None:
    """Its own, if it was trained with one; else fitted on documents that no training has seen. None: it predicts nothing."""
    if isinstance(predictor, LearnedPredictor):
        predictor.bind(court.model)
        if predictor.calibration is not None:
            return predictor.calibration
    found = samples(_judged(predictor, court, court.calibration))
    return Calibration.fit(found, court.geometry.top_k, method) if found else None


def _reliability(calibration: Calibration, judged: Sequence[Judged], top_k: int) -> Reliability:
    pairs = {target: pair for target, pair in samples(judged).items() if target in calibration.curves}
    p = [calibration.probabilities(target, scores, top_k).reshape(-1) for target, (scores, _) in pairs.items()]
    return reliability(torch.cat(p), torch.cat([chosen.reshape(-1) for _, chosen in pairs.values()]))


def _decode_views(recording: Recording, document: RecordedDocument) -> list[LayerView]:
    """The prefill of `document`, which a predictor may learn from, is left out; so are all but the first calls."""
    return [view for view in recording.views(document, 0) if view.step > 0][:N_COSTED_CALLS]
