"""The bundled model: its text is split cleanly, its tokens are bytes, and what the repository ships keeps its promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from scripts.bundled_corpus import SEPARATOR, SHIFTED_MODULE, Corpus, is_held_out, module_of, split_library
from scripts.bundled_model_card import byte_tokenizer

FOLDER = Path(__file__).parents[2] / "models" / "bytes-moe"
LIMIT_BYTES = 32_000_000
TOKENIZER = byte_tokenizer()


def held_out_name() -> str:
    """Any module name that the hash holds out."""
    return next(name for name in (f"module{i}" for i in range(1000)) if is_held_out(name))


def training_name() -> str:
    return next(name for name in (f"module{i}" for i in range(1000)) if not is_held_out(name))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library: one module for every case of the split."""
    files = {
        f"{training_name()}.py": b"learned",
        f"{held_out_name()}.py": b"held out",
        f"_{held_out_name()}.py": b"its private half",
        f"{SHIFTED_MODULE}/topics.py": b"topics = {'a': 'prose'}",
        f"test/test_{held_out_name()}.py": b"a leak",
        f"{training_name()}x/tests/case.py": b"a test",
        "encodings/cp1252.py": b"a table",
        "site-packages/foreign.py": b"not ours",
        "notes.txt": b"not Python",
    }
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


def test_every_file_lands_on_the_side_of_its_module(library: Path) -> None:
    training, held_out, shifted = split_library(library)
    assert set(training.files.values()) == {b"learned"}
    assert set(held_out.files.values()) == {b"held out", b"its private half"}
    assert set(shifted.files.values()) == {b"prose"}


def test_no_module_of_the_real_library_is_on_two_sides() -> None:
    sides = [{module_of(Path(name)) for name in corpus.files} for corpus in split_library()]
    training, held_out, shifted = sides
    assert not training & held_out and not training & shifted and not held_out & shifted
    assert len(held_out) >= 10, "too few modules to speak for the library"


def test_tokens_put_a_separator_before_every_file() -> None:
    corpus = Corpus({"a.py": b"\x00\xff", "empty.py": b"", "b.py": b"z"})
    assert corpus.tokens().tolist() == [SEPARATOR, 0, 255, SEPARATOR, SEPARATOR, ord("z")]


@given(st.text())
def test_token_ids_are_the_bytes_of_the_text(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


@pytest.fixture(scope="module")
def shipped_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


@given(text=st.text())
def test_shipped_tokenizer_has_byte_values_for_ids(shipped_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert shipped_tokenizer(text).input_ids == list(text.encode())


def test_shipped_folder_is_small_enough_to_travel() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= LIMIT_BYTES


def test_plain_transformers_loads_it_and_it_has_learned() -> None:
    model, report = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    text = "    def __init__(self, name):\n        self.name = name\n"
    ids = torch.tensor([[SEPARATOR, *text.encode()]])
    with torch.inference_mode():
        nats = model(input_ids=ids, labels=ids).loss.item()
    assert nats < 2.0, "a byte model that knows Python is far below 5.5 nats, the loss of a uniform guess"


def figures() -> dict[str, float]:
    return json.loads((FOLDER / "training.json").read_text())


def test_it_beats_xz_on_held_out_text() -> None:
    assert figures()["bits_per_byte_held_out"] < figures()["xz_bits_per_byte_held_out"]


def test_prompts_come_from_text_that_training_never_saw() -> None:
    prompts = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text().splitlines()]
    assert len({prompt["id"] for prompt in prompts}) == len(prompts) >= 24
    for prompt in prompts:
        module = module_of(Path(prompt["source"]))
        assert module == SHIFTED_MODULE if prompt["domain"] == "prose" else is_held_out(module)
        assert 200 <= len(prompt["text"].encode()) <= 400
