"""Route traces of BigMoeOnEdge: read as they were written, completed where the engine has no rows, refused where damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefetch.errors import TraceError
from prefetch.geometry import ExpertKey
from prefetch.trace import RoutingTrace
from prefetch.trace_formats.big_moe_on_edge import BigMoeOnEdge
from tests.prefetch.trace_formats.route_files import LAYERS, TOP_K, Turn, preamble, routing, rows, weight

CHAT = (Turn(4, 3), Turn(1, 0), Turn(2, 2))


def text_of(turns: tuple[Turn, ...] = CHAT, seed: int = 0) -> str:
    return preamble() + "".join(rows(turns, routing(turns, seed)))


def read(folder: Path, text: str) -> RoutingTrace:
    path = folder / "phone.route.csv"
    path.write_text(text)
    return BigMoeOnEdge().read(path)


def test_a_chat_comes_through(tmp_path: Path) -> None:
    read(tmp_path, text_of()).save(tmp_path / "t.safetensors")
    trace = RoutingTrace.load(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(trace.topk_ids, routing(CHAT))
    assert trace.sequence.tolist() == [0] * 7 + [1] + [2] * 4
    assert trace.step.tolist() == [0, 0, 0, 0, 1, 2, 3] + [0] + [0, 0, 1, 2]
    assert trace.phase.tolist() == [0, 0, 0, 0, 1, 1, 1] + [0] + [0, 0, 1, 1]
    assert not trace.token_ids.any()
    expected = [[[float(weight(t, layer, s)) for s in range(TOP_K)] for layer in range(3)] for t in range(12)]
    for prompt, final in ((slice(0, 4), 3), (slice(8, 10), 9)):
        expected[prompt] = [[*token[:2], expected[final][2]] for token in expected[prompt]]
    np.testing.assert_allclose(trace.topk_weights, expected, rtol=1e-6)
    assert (trace.n_experts, trace.metadata["model"]) == (16, "tiny moe-Q4")
    assert trace.metadata["row_bytes"] == "1200" and json.loads(trace.metadata["row_bytes_per_layer"]) == [1000, 1000, 1600]


def test_a_cache_sees_what_the_engine_routed(tmp_path: Path) -> None:
    """Each layer call needs the experts of its rows by first appearance in the file."""
    events: dict[tuple[str, ...], dict[int, None]] = {}
    for line in rows(CHAT, routing(CHAT)):
        turn, phase, step, layer, _, expert = line.split(",")[:6]
        events.setdefault((turn, phase, step if phase == "1" else "", layer), {})[int(expert)] = None
    expected = [[ExpertKey(LAYERS.index(int(key[3])), e) for e in experts] for key, experts in events.items()]
    assert read(tmp_path, text_of()).routing_events() == expected


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), turns=st.lists(st.builds(Turn, st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3))
def test_neither_the_order_of_rows_nor_further_columns_matter(tmp_path: Path, data: st.DataObject, turns: list[Turn]) -> None:
    lines = list(rows(turns, routing(turns)))
    shuffled = data.draw(st.permutations(lines))
    wider = preamble().rstrip("\n") + ",dropped\n" + "".join(line.rstrip("\n") + ",0\n" for line in shuffled)
    np.testing.assert_array_equal(read(tmp_path, wider).topk_ids, routing(turns))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, len(text_of()) - 1))
def test_a_truncated_file_is_refused_or_is_the_beginning(tmp_path: Path, length: int) -> None:
    """Cut off exactly behind a token or within a number that is not used, it cannot be told from a shorter recording."""
    whole = read(tmp_path, text_of())
    try:
        trace = read(tmp_path, text_of()[:length])
    except TraceError as error:
        assert "phone.route.csv" in str(error) and "\n" not in str(error)
        return
    np.testing.assert_array_equal(trace.topk_ids, whole.topk_ids[: trace.n_tokens])
    np.testing.assert_array_equal(trace.topk_weights, whole.topk_weights[: trace.n_tokens])


def test_weights_that_the_engine_could_not_see_become_equal_shares(tmp_path: Path) -> None:
    known = weight(0, 0, 0)
    trace = read(tmp_path, text_of().replace(f",{known},", ",nan,", 1))
    assert trace.topk_weights[0, 0, 0] == np.float32(1 / TOP_K)
    assert trace.metadata["topk_weights"] == "1 of 96 were not recorded: they are 1 / top-k"


def _replaced(old: str, new: str) -> Callable[[str], str]:
    def damage(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return damage


FIRST = "0,0,0,2,0,"  # turn, phase, step, layer, slot of the first row
FIRST_EXPERT = FIRST + f"{routing(CHAT)[0, 0, 0]},"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "its first line must be '# route_trace v1'"),
        (_replaced("route_trace v1", "route_trace v2"), "its first line must be"),
        (_replaced("n_expert=16 ", ""), "lacks the comment line '# model="),
        (_replaced("# layer=3 expert_bytes=1000", "# layer=3 expert_bytes=0"), "lacks the comment line '# layer=3 expert_bytes="),
        (_replaced(",expert,", ",xpert,"), "expected the columns turn, phase, step, layer, slot, expert"),
        (lambda text: preamble(), "it holds no rows"),
        (lambda text: text[: text.index(FIRST)].rsplit("\n", 2)[0] + "\n", "damaged or cut off"),
        (_replaced(FIRST_EXPERT, FIRST + "16,"), "expert 16 in turn 0, step 0, layer 2, slot 0 is out of range: expected 0 to 15"),
        (_replaced(FIRST_EXPERT, FIRST + "-1,"), "expert -1 in"),
        (_replaced(FIRST_EXPERT, FIRST + "many,"), "damaged or cut off"),
        (_replaced(FIRST_EXPERT, FIRST + "1.5,"), "damaged or cut off"),
        (_replaced(FIRST, "0,0,0,2,3,"), "slot 3 in .* is out of range: expected 0 to 2"),
        (_replaced(FIRST, "0,2,0,2,0,"), "phase 2 in"),
        (_replaced(FIRST, "0,0,-1,2,0,"), "step -1 in"),
        (_replaced(FIRST, "0,0,0,2,1,"), "there are two rows in turn 0, step 0, layer 2, slot 1"),
        (_replaced(FIRST, "0,0,0,3,0,"), "there are two rows in turn 0, step 0, layer 3, slot 0"),
        (_replaced(FIRST, "0,1,0,2,0,"), "the token in turn 0, step 0, .* is in the prefill as well as decoded"),
        (_replaced(weight(0, 0, 0), "inf"), "the weight in turn 0, step 0, layer 2, slot 0 is not finite"),
        (lambda text: text.replace("\n1,0,", "\n1,1,"), "turn 1 must begin with its prefill .phase 0. and then decode; see step 7"),
        (lambda text: text.replace("\n0,1,6,", "\n0,0,6,"), "turn 0 must begin with its prefill"),
        (lambda text: "".join(x for x in text.splitlines(True) if not x.startswith("0,1,5,3,1,")), "turn 0, step 5, layer 3, slot 1 is missing"),
        (lambda text: "".join(x for x in text.splitlines(True) if not x.startswith("0,0,3,4,")), "turn 0, step 0, layer 4, slot 0 is missing"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, damage: Callable[[str], str], said: str) -> None:
    with pytest.raises(TraceError, match=said) as error:
        read(tmp_path, damage(text_of()))
    assert "phone.route.csv" in str(error.value) and "\n" not in str(error.value)
