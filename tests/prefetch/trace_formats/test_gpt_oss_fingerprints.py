"""Packed fingerprints of gpt-oss: read as they were written, and refused by name where they are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefetch.errors import ConfigError, TraceError
from prefetch.trace import RoutingTrace
from prefetch.trace_formats.gpt_oss_fingerprints import GptOssFingerprints
from tests.prefetch.trace_formats.fingerprint_files import make_arrays, write


def test_sequences_that_do_not_loop_come_through_unchanged(tmp_path: Path) -> None:
    path, arrays = write(tmp_path)
    GptOssFingerprints().read(path).save(tmp_path / "t.safetensors")
    trace = RoutingTrace.load(tmp_path / "t.safetensors")
    rows = [0, 1, 2, 3, 7, 8, 9, 10, 11]
    np.testing.assert_array_equal(trace.topk_ids, arrays["ids"][rows])
    np.testing.assert_array_equal(trace.topk_weights, arrays["probs"][rows])
    assert trace.sequence.tolist() == [0] * 4 + [1] * 5
    assert trace.step.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert trace.phase.tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 1]
    assert (trace.n_experts, trace.n_layers, trace.top_k) == (32, 24, 4)
    assert trace.metadata["row_bytes"] == "13200000"
    assert trace.metadata["sequences"] == "2 of 3; 1 loop and are left out"


def test_token_strings_are_numbered_over_the_whole_file(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    everything = GptOssFingerprints(keep_loops=True).read(path)
    assert everything.token_ids.tolist() == [0, 1, 2, 1, 3, 3, 3, 1, 4, 5, 5, 6]
    assert GptOssFingerprints().read(path).token_ids.tolist() == [0, 1, 2, 1, 1, 4, 5, 5, 6]  # whatever is left out
    first = GptOssFingerprints(max_sequences=1).read(path)
    assert first.token_ids.tolist() == [0, 1, 2, 1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sequences=st.lists(st.tuples(st.lists(st.text(max_size=3), max_size=4), st.booleans()), min_size=1, max_size=5),
    max_sequences=st.none() | st.integers(1, 6),
)
def test_any_sequences_keep_their_routing(
    tmp_path: Path, sequences: list[tuple[list[str], bool]], max_sequences: int | None
) -> None:
    """Strings of any characters, also those that some readers take for a line's end; sequences without tokens."""
    path, arrays = write(tmp_path, [text for text, _ in sequences], [loop for _, loop in sequences])
    kept = [n for n, (text, loop) in enumerate(sequences) if text and not loop][:max_sequences]
    reader = GptOssFingerprints(max_sequences=max_sequences)
    if not kept:
        with pytest.raises(TraceError, match="none of its"):
            reader.read(path)
        return
    trace = reader.read(path)
    assert [int(rows.sum()) for rows in (trace.sequence == np.arange(len(kept))[:, None])] == [
        len(sequences[n][0]) for n in kept
    ]
    expected = np.concatenate([arrays["ids"][arrays["offsets"][n] : arrays["offsets"][n + 1]] for n in kept])
    np.testing.assert_array_equal(trace.topk_ids, expected)
    named = {token: set() for n in kept for token in sequences[n][0]}
    for token, number in zip((token for n in kept for token in sequences[n][0]), trace.token_ids.tolist(), strict=True):
        named[token].add(number)
    assert all(len(numbers) == 1 for numbers in named.values()) and len(set().union(*named.values())) == len(named)


def _arrays(**changed: Any) -> dict[str, Any]:
    return {name: change(array) for name, array in make_arrays([4, 3, 5]).items() if (change := changed.get(name))}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_arrays(ids=lambda ids: np.where(ids == 31, 32, ids).astype(np.uint8)), "names expert 32, but gpt-oss-20b has 32"),
        (_arrays(ids=lambda ids: ids[:, :23]), r"ids is uint8 \(12, 23, 4\), expected uint8 \(12, 24, 4\)"),
        (_arrays(ids=lambda ids: ids.astype(np.int64)), "ids is int64"),
        (_arrays(ids=lambda ids: ids[0, 0, 0]), r"ids is uint8 \(\), expected"),
        (_arrays(probs=lambda probs: probs[:-1]), r"probs is float16 \(11, 24, 4\), expected float16 \(12, 24, 4\)"),
        (_arrays(probs=lambda probs: probs * np.float16(np.nan)), "probs are not finite"),
        (_arrays(offsets=lambda offsets: offsets[:-1]), "offsets must rise from 0 to the number of rows, 12"),
        (_arrays(offsets=lambda offsets: offsets[::-1].copy()), "offsets must rise"),
        (_arrays(offsets=lambda offsets: offsets[:0]), "offsets must rise"),
        ({"offsets": None}, "not an npz file with the arrays ids, probs, offsets"),
        ({"ids": np.array([{}], dtype=object)}, "not an npz file with"),
    ],
)
def test_damaged_arrays_are_named(tmp_path: Path, damage: dict[str, Any], said: str) -> None:
    path, _ = write(tmp_path, **damage)
    with pytest.raises(TraceError, match=said) as error:
        GptOssFingerprints().read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_npz_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TraceError, match=r"small\.npz: not an npz file with .* or truncated"):
            GptOssFingerprints().read(path)


def test_a_single_array_is_no_npz_file(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros(3))
    with pytest.raises(TraceError, match="not an npz file"):
        GptOssFingerprints().read(tmp_path / "ids.npy")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"tokens": ["x", "x", "x"], "repet', "line 2: not JSON, or truncated"),
        ('{"tokens": ["x", "x"], "repetition": true}', "line 2: it has 2 tokens, but the npz file 3 rows"),
        ('{"tokens": ["x", "x", 3], "repetition": true}', "line 2: tokens must be a list of strings"),
        ('{"tokens": ["x", "x", "x"], "repetition": "no"}', "line 2: repetition must be true or false"),
        ("[1]", "line 2: repetition"),
        ("[1]\n[2]", "it has 4 lines, expected one for each of the 3 sequences"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: str, said: str) -> None:
    path, _ = write(tmp_path)
    texts = tmp_path / "small.meta.jsonl"
    lines = texts.read_text(encoding="utf-8").split("\n")
    texts.write_text("\n".join([lines[0], line, *lines[2:]]), encoding="utf-8")
    with pytest.raises(TraceError, match=rf"small\.meta\.jsonl.*{said}") as error:
        GptOssFingerprints().read(path)
    assert "\n" not in str(error.value)


def test_without_its_meta_file_an_npz_is_refused(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    (tmp_path / "small.meta.jsonl").unlink()
    with pytest.raises(TraceError, match=r"small\.meta\.jsonl: it must lie beside the npz file"):
        GptOssFingerprints().read(path)


def test_max_sequences_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match="format.max_sequences=0: it must be at least 1"):
        GptOssFingerprints(max_sequences=0)
