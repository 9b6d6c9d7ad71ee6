"""A benchmark's medians as bars, one panel per case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness import Row

COLUMNS = 3


def plot(title: str, rows: Sequence[Row], heading: str, path: Path) -> None:
    """Bars of milliseconds on a logarithmic axis with the 20 … 80 % range; the floor as a dashed line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((r.kind, r.size, r.dtype) for r in rows if r.median is not None))
    lines = -(-len(cases) // COLUMNS) or 1
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(5 * COLUMNS, 2.6 * lines), squeeze=False)
    for axis, case in zip(axes.flat, cases):
        _panel(axis, case, [r for r in rows if (r.kind, r.size, r.dtype) == case and r.median is not None])
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    figure.suptitle(f"{title}: {heading}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _panel(axis, case: tuple[str, str, str], rows: list[Row]) -> None:  # type: ignore[no-untyped-def]
    names = [r.contender for r in rows]
    medians = [1e3 * r.median for r in rows]  # type: ignore[operator]
    spread = [[1e3 * (r.median - r.low) for r in rows], [1e3 * (r.high - r.median) for r in rows]]  # type: ignore[operator]
    axis.barh(names, medians, xerr=spread, color=["#1b6ca8"] + ["#b8c4cc"] * (len(rows) - 1), error_kw={"lw": 1})
    for place, row in enumerate(rows):
        axis.annotate(
            f" {row.ratio:.3g}×" if place and row.ratio else "", (medians[place], place), va="center", fontsize=7
        )
    if rows and rows[0].floor:
        axis.axvline(1e3 * rows[0].floor, color="black", linestyle="--", linewidth=0.8)
    axis.set_xscale("log")
    axis.invert_yaxis()
    axis.set_title(" ".join(case), fontsize=8)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("ms (dashed: floor)", fontsize=7)
