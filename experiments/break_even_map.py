"""The picture of a break-even map: one panel per share of experts in slots, link across, accuracy of the guesses upwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from experiments.atomic import replacing
from experiments.plots import STYLE

LEVELS = (1.0, 1.1, 1.3, 1.5, 2.0)  # lines of equal speed-up
DARKEST = 0.45  # how far from 1 the colours reach, at least


def draw(table: pd.DataFrame, title: str, path: Path) -> None:
    """Draw `ratio` of each point of `table` as colour, with lines at LEVELS; above each link what perfect guesses can reach (`overlap`)."""
    slots = sorted(table["slots"].unique())
    reach = max(DARKEST, float((table["ratio"] - 1).abs().max()))
    norm = TwoSlopeNorm(1.0, 1.0 - reach, 1.0 + reach)
    with rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 3.9 * len(slots), 4.6), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(slots), sharey=True))
        for axes, fraction in zip(panels, slots, strict=True):
            mesh = _panel(axes, table[table["slots"] == fraction], norm)
            axes.set_title(f"{100 * fraction:.0f} % of experts in slots", loc="left", pad=20)
        panels[0].set_ylabel("recall@k of the guesses (%)")
        figure.supxlabel("link (GB/s); on top: what perfect guesses can reach with this cache", fontsize=11)
        figure.colorbar(mesh, ax=panels, label="speed against the cache alone (×)")
        figure.suptitle(title.replace(": ", ":\n", 1), x=0.01, ha="left", fontsize=12)
        with replacing(path) as aside:
            figure.savefig(aside, format="png")


def _panel(axes: Axes, points: pd.DataFrame, norm: TwoSlopeNorm) -> QuadMesh:
    grid = points.pivot(index="accuracy", columns="link_bytes_per_s", values="ratio")
    x, y, ratio = np.arange(grid.shape[1]), 100 * grid.index.to_numpy(dtype=float), grid.to_numpy()
    mesh = axes.pcolormesh(x, y, ratio, cmap="RdBu", norm=norm, shading="gouraud")
    lines = axes.contour(x, y, ratio, levels=LEVELS, colors="black", linewidths=[2.2, 0.8, 1.6, 0.8, 0.8])
    axes.clabel(lines, fmt=lambda level: f"{level:g} ×", fontsize=9)
    bounds = points.groupby("link_bytes_per_s")["overlap"].first()
    axes.set_xticks(x, [f"{link / 1e9:g}" for link in bounds.index.to_numpy(dtype=float)])
    above: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center", "fontsize": 9}
    for place, bound in zip(x.tolist(), bounds.tolist(), strict=True):
        axes.annotate(f"{bound:.2f} ×", (place, 1.0), xytext=(0, 3), **above)
    axes.set_xlim(-0.35, len(x) - 0.65)
    axes.grid(visible=False)
    return mesh
