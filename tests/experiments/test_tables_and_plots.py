"""Tables say what they must, bounds included; pictures are written whole, with every arm in the one order."""

from __future__ import annotations

import dataclasses
import io
import math
import struct
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import experiments.plots
from experiments.plots import looks, recall_per_layer, time_breakdown, tokens_per_s_vs_slots
from experiments.results import ArmResult, Results, legend_order
from experiments.tables import comparison, markdown_comparison, rich_comparison, write_comparison
from tests.experiments.synthetic_results import SPEEDS, make_results

BOUNDS = ("no_cache", "oracle", "all_resident")


def text_of(results: Results, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(rich_comparison(results, width))
    return captured.get()


def row_of(text: str, arm: str) -> str:
    return next(line for line in text.splitlines() if line.strip(" |").split(" ")[0] == arm)


def test_a_narrow_terminal_cuts_no_name() -> None:
    results = make_results()
    text = text_of(results, 80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert all(text.count(name) >= 2 for name in results.arms) and text.count("lossless") == 2


def test_numbers_of_the_comparison_are_those_of_the_repeats() -> None:
    results = make_results()
    table = comparison(results).set_index("arm")
    assert list(table.index) == [*legend_order([results]), "belady"]
    speeds = {name: sorted(arm.values("tokens_per_s")) for name, arm in results.arms.items()}
    for name, (low, median, high) in speeds.items():
        found = table.loc[name, ["tokens_per_s_low", "tokens_per_s", "tokens_per_s_high"]]
        assert found.tolist() == pytest.approx([low, median, high])
    assert table.loc["slru", "ratio"] == 1.0
    assert table.loc["oracle", "share_of_gain"] == 1.0
    assert 0.5 < table.loc["gate_reuse", "share_of_gain"] < 0.75  # 7 of 11 tokens/s
    assert table.loc["gate_reuse", "differs"]
    assert math.isnan(table.loc["all_resident", "share_of_gain"])  # a predictor's figure
    assert table.loc["gate_reuse", "recall"] == pytest.approx(0.8, abs=0.03)
    assert table.loc["gate_reuse", "recall_all"] == pytest.approx(0.7, abs=0.03)  # one layer of eight is never predicted


def test_bounds_are_called_bounds_and_replays_simulated() -> None:
    results = make_results()
    for text in (text_of(results, 140), markdown_comparison(results)):
        for name in BOUNDS:
            assert row_of(text, name).strip(" |").startswith(f"{name} (bound)")
        assert "belady (bound, simulated)" in text
        assert "73 / – / 27" in text
        assert "(bound" not in row_of(text, "slru")
        assert "emulated" not in text
    assert comparison(results).set_index("arm").loc["belady", "conditions"] == "simulated"


def test_emulated_runs_are_called_emulated() -> None:
    assert "emulated link" in markdown_comparison(make_results(emulated=True))
    assert "emulated link" in text_of(make_results(emulated=True), 140)
    mixed = make_results()
    mixed.arms["gate_reuse"] = dataclasses.replace(mixed.arms["gate_reuse"], emulated=True)
    assert "gate_reuse (emulated)" in markdown_comparison(mixed)
    assert "slru (measured)" in markdown_comparison(mixed)
    assert set(comparison(mixed)["conditions"]) == {"measured", "emulated", "simulated"}


def test_quantised_runs_name_their_format_and_what_lossless_means() -> None:
    quantised = dataclasses.replace(make_results(), quantised="int4 per 32")
    for text in (markdown_comparison(quantised), text_of(quantised, 140)):
        assert "of all experts, int4 per 32, measured" in text
        assert "quantised in the same way (int4 per 32), lossy against the original" in " ".join(text.split())
    assert "quantised" not in markdown_comparison(make_results())


def test_what_is_within_the_spread_is_marked() -> None:
    results = make_results()
    noisy = [
        dict(r, tokens_per_s=r["tokens_per_s"] * f)
        for r, f in zip(results.arms["slru"].repeats, (1.03, 0.98, 1.02), strict=True)
    ]
    results.arms["popularity"] = dataclasses.replace(results.arms["popularity"], repeats=noisy)
    text = markdown_comparison(results)
    assert "≈" in row_of(text, "popularity")
    assert "≈" not in row_of(text, "gate_reuse")
    assert "≈" not in row_of(text, "slru")


def test_lossy_arms_and_missing_figures_show() -> None:
    results = make_results()
    results.arms["route"] = ArmResult("predictor", [{"tokens_per_s": 33.0}] * 3, None, lossless=False, emulated=False)
    speed, _ = markdown_comparison(results).split("**Guesses")
    assert row_of(speed, "route").endswith("| – / – | – | ✗ |")
    assert row_of(speed, "slru").endswith("| ✓ |")


def test_no_column_is_lost_in_a_narrow_terminal() -> None:
    words = " ".join(text_of(make_results(), 80).split())
    for word in ("tokens/s", "TTFT", "lossless", "stall", "demand", "wasted", "link"):
        assert word in words


def test_tables_are_written_as_csv_and_markdown(tmp_path: Path) -> None:
    csv, markdown = write_comparison(make_results(), tmp_path)
    assert len(pd.read_csv(csv)) == len(SPEEDS) + 1
    assert markdown.read_text() == markdown_comparison(make_results())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.csv", "comparison.md"]


def test_every_arm_looks_different_and_the_same_in_every_picture() -> None:
    results = make_results()
    found = looks([results])
    assert list(found) == legend_order([results])
    assert len(set(found.values())) == len(found)
    assert all((look.marker == "") == (name in BOUNDS) for name, look in found.items())
    assert looks([results, make_results(0.45)]) == found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, which still know their texts."""
    figures: list[Figure] = []
    save = experiments.plots._save

    def keep(figure: Figure, path: Path) -> None:
        save(figure, path)
        figures.append(figure)

    monkeypatch.setattr(experiments.plots, "_save", keep)
    return figures


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"IEND" in content[-12:]
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("fractions", [(0.25,), (0.125, 0.25, 0.45)])
def test_speed_plot_has_every_arm_bounds_spreads_and_units(
    tmp_path: Path, drawn: list[Figure], fractions: tuple[float, ...]
) -> None:
    path = tmp_path / "speed.png"
    tokens_per_s_vs_slots([make_results(f, emulated=True) for f in fractions], path)
    assert min(png_size(path)) > 500
    (figure,) = drawn
    labels = ["slru", "popularity", "previous_token", "gate_reuse", *(f"{name} (bound)" for name in BOUNDS)]
    assert legend_labels(figure) == labels
    (axes,) = figure.axes
    assert "tokens per second" in axes.get_ylabel()
    assert "emulated" in axes.get_title(loc="left")
    assert len(axes.containers) == 4  # error bars of the arms that are no bounds
    assert len(axes.collections) + len(axes.patches) >= len(BOUNDS)  # bands of the bounds


def test_recall_plot_has_a_line_per_predictor_and_shows_layers_without_one(tmp_path: Path, drawn: list[Figure]) -> None:
    recall_per_layer(make_results(), tmp_path / "recall.png")
    assert min(png_size(tmp_path / "recall.png")) > 500
    recall, cold = drawn[0].axes
    assert legend_labels(drawn[0]) == ["popularity", "previous_token", "gate_reuse", "oracle (bound)"]
    assert "(%)" in recall.get_ylabel()
    for axes in (recall, cold):
        assert len(axes.lines) == 4
        for line in axes.lines:
            assert list(line.get_xdata()) == list(range(8))
            assert math.isnan(line.get_ydata()[0])
            assert all(0 <= y <= 100 for y in line.get_ydata()[1:])


def test_time_plot_bars_add_up_to_the_time_of_a_token(tmp_path: Path, drawn: list[Figure]) -> None:
    results = make_results()
    results.arms["unknown"] = ArmResult("bound", [{"tpot_mean_s": 0.05, "tokens_per_s": 20.0}], None, True, False)
    time_breakdown(results, tmp_path / "time.png")
    assert min(png_size(tmp_path / "time.png")) > 400
    (axes,) = drawn[0].axes
    assert "(ms)" in axes.get_xlabel()
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"{n} (bound)" if arm.role == "bound" else n for n, arm in results.ordered()]
    for y, (_, arm) in enumerate(results.ordered()):
        width = sum(bar.get_width() for bar in axes.patches if abs(bar.get_y() + bar.get_height() / 2 - y) < 0.1)
        assert width == pytest.approx(1e3 * sorted(arm.values("tpot_mean_s"))[len(arm.repeats) // 2])
    assert len(legend_labels(drawn[0])) == 5
