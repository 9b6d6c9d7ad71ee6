"""The plots of a campaign's report, as figures of matplotlib. Colours and marks are apart in grey and for all eyes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rom.campaign.errors import CampaignError
from rom.campaign.records import OUTCOMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rom.campaign.tables import BitMap, Group

# Okabe and Ito's colours, from light to dark as outcomes get worse, and a hatch each for print.
STYLES = {
    "masked": ("#f2f2f2", ""),
    "tolerable": ("#9ad0f3", ""),
    "sdc": ("#e69f00", "///"),
    "critical": ("#d55e00", "xxx"),
    "due": ("#333333", ""),
}
NEVER = "////"  # cells of the map without a fault


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise CampaignError("the report needs matplotlib: `pip install 'rom-kernels[campaign]'`.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _height(rows: int) -> float:
    return 1.3 + 0.34 * rows


def outcomes(groups: Sequence[Group]) -> Figure:
    """Left: how the cells of every layer end. Right: top-1 changes, correct answers lost, and due, with intervals."""
    figure = _figure(9.6, _height(len(groups)) + 0.3)
    shares, rates = figure.subplots(1, 2, sharey=True, width_ratios=[1.15, 1])
    places = np.arange(len(groups))
    left = np.zeros(len(groups))
    for name in OUTCOMES:
        width = np.array([group.estimates[name].value for group in groups])
        colour, hatch = STYLES[name]
        shares.barh(places, width, left=left, color=colour, hatch=hatch, edgecolor="#555555", linewidth=0.5, label=name)
        left += width
    shares.set(yticks=places, yticklabels=[group.name for group in groups], xlim=(0, 1), xlabel="share of cells")
    shares.invert_yaxis()
    shares.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8, handlelength=1.4)
    marks = (("mismatch", "o", "#0072b2"), ("critical", "s", "#d55e00"), ("due", "^", "#333333"))
    for shift, (name, marker, colour) in enumerate(marks):
        label = "top-1 changes" if name == "mismatch" else name
        _dots(rates, [group.estimates[name] for group in groups], places + 0.22 * (shift - 1), marker, colour, label)
    rates.set(xlabel="rate, with interval", xlim=(0, None))
    rates.grid(axis="x", alpha=0.3)
    rates.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    return figure


def _dots(axes: Any, estimates: Sequence[Any], places: Any, marker: str, colour: str, label: str) -> None:
    value = np.array([e.value for e in estimates])
    error = [np.maximum(value - [e.low for e in estimates], 0), np.maximum([e.high for e in estimates] - value, 0)]
    axes.errorbar(
        value, places, xerr=error, fmt=marker, color=colour, markersize=4, capsize=2, linewidth=1, label=label
    )


def bit_map(found: BitMap) -> Figure:
    """How often a flip of each bit of each layer changes the top-1; hatched where no fault fell, blank: no such bit."""
    from matplotlib.colors import PowerNorm  # noqa: PLC0415

    rows, bits = found.rates.shape
    figure = _figure(max(5.0, 2.6 + 0.24 * bits), _height(rows) + 0.4)
    axes = figure.subplots()
    drawn = np.ma.masked_invalid(found.rates[:, ::-1])  # the sign on the left, as bits are written
    image = axes.pcolormesh(drawn, cmap="Blues", norm=PowerNorm(0.5, 0, 1), edgecolors="#dddddd", linewidth=0.3)
    axes.set_facecolor("white")
    for row, column in np.argwhere((found.faults == 0) & found.exists):
        corner = (bits - 1 - column, row)
        axes.add_patch(_box(corner, hatch=NEVER, edgecolor="#999999", linewidth=0))
    silent = np.argwhere((found.faults > 0) & (found.rates == 0))
    axes.plot(bits - 0.5 - silent[:, 1], silent[:, 0] + 0.5, ".", color="#888888", markersize=2)
    for row, borders in enumerate(found.borders):
        for bit in borders:
            axes.plot([bits - bit] * 2, [row, row + 1], color="black", linewidth=1.2)
    ticks = np.array(sorted({*range(0, bits, 1 if bits <= 16 else 4), bits - 1}))
    axes.set(yticks=np.arange(rows) + 0.5, yticklabels=found.names)
    axes.set_xlabel("bit (black lines: sign | exponent | mantissa)")
    axes.set_xticks(bits - ticks - 0.5, [str(tick) for tick in ticks])
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, label="rate of top-1 changes", ticks=[0, 0.01, 0.1, 0.25, 0.5, 1], pad=0.02)
    return figure


def _box(corner: tuple[float, float], **style: Any) -> Any:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    return Rectangle(corner, 1, 1, fill=False, **style)


def losses(groups: Sequence[Group]) -> Figure:
    """Mean |Δloss| per layer with intervals, on a logarithmic axis; open marks: no fault changed the loss."""
    figure = _figure(7.2, _height(len(groups)))
    axes = figure.subplots()
    estimates = [group.estimates["delta_loss"] for group in groups]
    above = [x for e in estimates for x in (e.value, e.low) if math.isfinite(x) and x > 0]
    floor = 10 ** math.floor(math.log10(min(above))) / 3 if above else 1e-3
    for place, e in enumerate(estimates):
        if math.isfinite(e.value) and e.value > 0:
            ends = [max(e.low, floor), max(e.high, e.value)]
            axes.plot(ends, [place, place], color="#0072b2", linewidth=1.2, marker="|", markersize=6)
            axes.plot(e.value, place, "o", color="#0072b2", markersize=5)
        elif math.isfinite(e.value):
            axes.plot(floor, place, "o", markerfacecolor="white", color="#0072b2", markersize=5)
    axes.set_xscale("log")
    axes.set_xlim(floor / 1.5, None)
    axes.set(
        yticks=np.arange(len(groups)),
        yticklabels=[group.name for group in groups],
        xlabel="mean |Δloss| of cells that are not due, nats",
        ylim=(len(groups) - 0.5, -0.5),
    )
    axes.grid(axis="x", alpha=0.3)
    return figure
