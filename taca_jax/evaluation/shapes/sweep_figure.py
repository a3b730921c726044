"""The figure of a sweep: each setting's difference from the plain base, with its interval."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from taca_jax.evaluation.shapes.halves import HELD_OUT, SEEN
from taca_jax.evaluation.sweeps import EACH_ALONE
from taca_jax.formats.atomic import whole_file

_ROW = 0.32  # inches


def draw_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG with a line for each setting but the plain base, and a panel for each half.

    rows: as in sweep.json.
    """
    compared = [row for row in rows if "difference" in row[SEEN]]
    figure = Figure(figsize=(12, 1.4 + _ROW * max(1, len(compared))), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, half in zip(panels, (SEEN, HELD_OUT), strict=True):
        for measure, offset, color in (("correct", -0.12, "tab:blue"), ("exact", 0.12, "tab:gray")):
            found = [row[half]["difference"][measure] for row in compared]
            value = [100 * each["value"] for each in found]
            ends = [
                [100 * (each["value"] - each["low"]) for each in found],
                [100 * (each["high"] - each["value"]) for each in found],
            ]
            places = [i + offset for i in range(len(found))]
            label = "right" if measure == "correct" else "right and nothing else drawn"
            panel.errorbar(
                value, places, xerr=ends, fmt="o", color=color, markersize=4, label=label
            )
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(f"{half} compositions")
        panel.set_xlabel("points more than the plain base, 95 % interval")
        panel.grid(axis="x", alpha=0.3)
    figure.supxlabel(EACH_ALONE, fontsize=8)
    panels[0].set_yticks(range(len(compared)), [row["name"] for row in compared])
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150)
