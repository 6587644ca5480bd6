"""The pages show what the records beside them say, and nothing is replaced when a record is damaged."""

import json
import shutil
from pathlib import Path

import pytest

from prefetch.errors import ResultsError
from scripts.results_page import KEPT, pages, publish

REPOSITORY = Path(__file__).parents[2]
RECORDS = REPOSITORY / "docs" / "results"


def test_every_figure_on_the_pages_is_one_of_the_records():
    for page, text in pages(RECORDS, REPOSITORY).items():
        assert page.read_text() == text, f"{page.name} is not what python -m scripts.results_page makes of docs/results"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    return tmp_path


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    shutil.copytree(RECORDS, tmp_path / "measured")
    return tmp_path / "measured"


def test_new_figures_replace_old_ones(copy: Path, measured: Path):
    record = measured / "bench" / "bench.json"
    found = json.loads(record.read_text())
    found["exactness_float32"] |= {"tokens_compared": 123456}
    record.write_text(json.dumps(found))
    publish(measured, copy)
    assert "123456 of 123456" in (copy / "docs" / "results.md").read_text()
    assert all((copy / "docs" / "results" / kept).read_bytes() == (measured / kept).read_bytes() for kept in KEPT)


@pytest.mark.parametrize("damaged", ["slots_25/results.json", "bench/bench.json"])
def test_a_damaged_record_is_named_and_changes_nothing(copy: Path, measured: Path, damaged: str):
    (measured / damaged).write_text("{")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and not path.is_relative_to(measured)}
    with pytest.raises(ResultsError, match=damaged):
        publish(measured, copy)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_page_without_its_marker_is_named(copy: Path, measured: Path):
    (copy / "README.md").write_text("nothing here")
    with pytest.raises(ResultsError, match="README.md: the markers"):
        publish(measured, copy)
