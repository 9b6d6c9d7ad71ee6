"""The report of a campaign: one HTML file with plots and tables that opens anywhere, and a summary for terminals."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rom import files
from rom.campaign import figures, tables
from rom.campaign.statistics import Estimate, Schedule
from rom.faults import FaultPlan

Row = Mapping[str, Any]
_SHOWN = ("mismatch", "critical", "due", "delta_loss")
_HEADS = {"mismatch": "top-1 changes", "critical": "critical", "due": "due", "delta_loss": "mean |Δloss|"}
_WEIGHTED = {"neuron": "every fault the same", "layer": "every layer the same"}
_MEANINGS = {
    "masked": "the outputs are the golden ones, bit for bit",
    "tolerable": "other numbers, the same top-1",
    "sdc": "silent data corruption: another top-1 than the golden one, which was wrong already",
    "critical": "the golden top-1 was right and the faulty one is not",
    "due": "NaN or infinity in the outputs, which can be detected",
}


@dataclass(frozen=True)
class Campaign:
    """What a report is about.

    Attributes:
        table: RESULT `[n]`, any order.
        plan: whose faults they are.
        golden: figures of the run without faults ("samples", "accuracy", "loss", "top2_difference"; any may be absent).
        identity: fingerprints and options, as they are to be shown.
        level: of the intervals.
        looks: how often the campaign might have stopped early; `level` is then that of each look.
    """

    table: np.ndarray
    plan: FaultPlan
    golden: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    level: float = 0.95
    looks: int = 1

    @classmethod
    def read(cls, path: str | Path) -> Campaign:
        """What a store holds. CampaignError: it cannot be read."""
        from rom.campaign.store import Store  # noqa: PLC0415 - a report of arrays needs no database

        with Store(path) as store:
            found, rule, size = store.results(), store.get("stop"), store.blocks.size
        level, looks = 0.95, 1
        if rule is not None:
            first = min(-(-rule["first"] // size) * size, len(found.plan))
            schedule = Schedule.doubling(first, len(found.plan), rule["level"])
            level, looks = schedule.level_of_each, len(schedule.looks)
        return cls(found.table, found.plan, found.golden, found.identity, level, looks)


def write(
    source: str | Path | Campaign,
    path: str | Path,
    *,
    ablation: Sequence[Row] | None = None,
    title: str = "Fault injection campaign",
) -> str:
    """Writes the report of a campaign and returns its summary (`summary`).

    Args:
        source: the file of a campaign, or a `Campaign` of arrays.
        path: of the HTML file. It is static, needs no network, and prints.
        ablation: rows of a further table, columns by name; values are shown as they are, `Estimate`s with intervals.
        title: of the page.

    Raises:
        CampaignError: the campaign cannot be read, or matplotlib is missing (extra `campaign`).
    """
    campaign = source if isinstance(source, Campaign) else Campaign.read(source)
    page = _Page(campaign, title, ablation)
    with files.replacing(Path(path)) as partial:
        partial.write_text(page.html(), encoding="utf-8")
    return page.markdown()


def summary(source: str | Path | Campaign, title: str = "Fault injection campaign") -> str:
    """The report's numbers as Markdown, readable in a terminal. Needs no matplotlib."""
    return _Page(source if isinstance(source, Campaign) else Campaign.read(source), title).markdown()


class _Page:
    """The numbers of a report, and its two forms."""

    def __init__(self, campaign: Campaign, title: str, ablation: Sequence[Row] | None = None) -> None:
        self.campaign, self.title, self.ablation = campaign, title, ablation
        table, plan = campaign.table, campaign.plan
        self.groups = tables.by_layer(table, plan, campaign.level)
        self.overall = tables.overall(table, plan, self.groups, campaign.level)
        self.unseen = tables.unseen(table, plan)

    # ------------------------------------------------------------------------------------------------ contents
    def layers(self) -> list[dict[str, str]]:
        """The main table: a row per layer and target, then all of them."""
        rows = []
        for group in self.groups:
            rows.append(
                {
                    "layer": group.layer or "(whole)",
                    "target": group.target,
                    "faults": f"{group.faults:,} of {_count(group.population)}",
                    "cells": f"{group.cells:,}",
                    **{_HEADS[name]: _shown(name, group.estimates[name]) for name in _SHOWN},
                }
            )
        for weighting, found in self.overall.items():
            rows.append(
                {
                    "layer": f"all, {_WEIGHTED[weighting]}",
                    "target": "",
                    "faults": f"{len(self.campaign.table):,} of {_count(sum(g.population for g in self.groups))}",
                    "cells": f"{sum(g.cells for g in self.groups):,}",
                    **{_HEADS[name]: _shown(name, found[name]) for name in _SHOWN},
                }
            )
        return rows

    def sampling(self) -> dict[str, str]:
        """How the faults were chosen."""
        plan, done = self.campaign.plan, len(self.campaign.table)
        schemes = {
            "simple": "simple random sample of all faults, without replacement",
            "stratified": "simple random sample in every stratum, without replacement",
            "exhaustive": "every fault",
            "file": "sites given one by one, or by a rate",
        }
        kinds = sorted({f"{s.kind} of {s.dtype}" for s in plan.strata})
        return {
            "scheme": f"{plan.scheme}: {schemes[plan.scheme]}",
            "seed": str(plan.seed),
            "faults": f"{done:,} done of {len(plan):,} planned ({done / max(len(plan), 1):.1%})",
            "strata": f"{len(plan.strata)} with {_count(sum(s.size for s in plan.strata))} possible faults",
            "error model": ", ".join(kinds),
            "intervals": f"{self.campaign.level:.4g} each"
            + (f"; {self.campaign.looks} looks were scheduled, which hold together" if self.campaign.looks > 1 else ""),
        }

    def golden(self) -> dict[str, str]:
        """The run without faults."""
        names = {"samples": "samples", "accuracy": "accuracy", "loss": "mean loss", "top2_difference": "Top2Diff"}
        return {names[key]: _plain(value) for key, value in self.campaign.golden.items() if key in names}

    def limitations(self) -> list[str]:
        """What the numbers do not say; some of it depends on the campaign."""
        campaign, (missing, silent, worst) = self.campaign, self.unseen
        out = [
            "These are effects of faults, not rates at which hardware has them: a rate of failures needs the rate of "
            "faults per bit and hour.",
            "The intervals are about faults that were not injected, for this model and these samples. They are made "
            "of differences between faults, not between cells: cells of one fault are alike.",
            "Mean |Δloss| leaves out cells that are due, which are counted on their own, and is heavy-tailed: without "
            "range restriction a few flips of the exponent decide it, and its interval depends on having met them.",
        ]
        if missing:
            out.append(f"{missing} of {len(campaign.plan.strata)} strata have no fault yet and are in no figure here.")
        if silent:
            out.append(
                f"In {silent} strata no fault changed a top-1. Up to {worst:.2g} of theirs may (rule of three, 95 %, "
                "for the least sampled): that none was seen does not say that there is none."
            )
        if len(campaign.table) < len(campaign.plan):
            unordered = campaign.plan.scheme != "exhaustive"
            out.append(
                "The campaign is not complete."
                + (
                    ""
                    if unordered
                    else " Its faults so far are the first in order, no random sample: no interval holds."
                )
            )
        if campaign.plan.scheme == "file":
            out.append("The faults were given, or drawn by a rate: intervals take them for a random sample of faults.")
        return out

    # ------------------------------------------------------------------------------------------------ HTML
    def html(self) -> str:
        """The whole page."""
        campaign = self.campaign
        parts = [f"<h1>{escape(self.title)}</h1>", f"<p class=lead>{escape(self._lead())}</p>"]
        if self.groups:
            found = tables.bit_map(campaign.table, campaign.plan)
            parts += [
                "<h2>How answers end, by layer</h2>",
                _image(figures.outcomes(self.groups), "Shares of outcomes and rates with intervals, by layer"),
                _definitions(_MEANINGS),
                "<h2>Which bits matter</h2>",
                _image(figures.bit_map(found), "Rate of top-1 changes by layer and bit"),
                "<p>Darker: more top-1 changes (the scale is a square root). A grey dot: faults, but no change. "
                "Hatched: no fault was injected there. White without a mark: the data type has no such bit, or it is "
                "not in the plan.</p>",
                "<h2>How far the loss moves</h2>",
                _image(figures.losses(self.groups), "Mean absolute change of the loss by layer"),
                "<h2>Table</h2>",
                _table(self.layers()),
                f"<p>Brackets: intervals of level {campaign.level:.4g}, clustered by fault. A fault that meets several "
                "samples makes several cells.</p>",
            ]
        if self.ablation:
            parts += ["<h2>Ablation</h2>", _table([{k: _plain(v) for k, v in row.items()} for row in self.ablation])]
        parts += ["<h2>Sampling</h2>", _definitions(self.sampling())]
        if self.golden():
            parts += ["<h2>Without faults</h2>", _definitions(self.golden())]
        parts += ["<h2>Limitations</h2>", _list(self.limitations())]
        prints = {"plan": campaign.plan.fingerprint()} | {k: _plain(v) for k, v in campaign.identity.items()}
        parts += ["<h2>Fingerprints and options</h2>", _definitions(prints)]
        head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
        view = '<meta name="viewport" content="width=device-width">'
        return "\n".join([f"{head}{view}<style>{_STYLE}</style></head><body>", *parts, "</body></html>\n"])

    def _lead(self) -> str:
        if not self.overall:
            return "No fault has been injected yet."
        found = self.overall["neuron"]
        return (
            f"{len(self.campaign.table):,} faults: {_shown('mismatch', found['mismatch'])} of the answers they meet "
            f"change, {_shown('critical', found['critical'])} become wrong, {_shown('due', found['due'])} are NaN or "
            "infinite."
        )

    # ------------------------------------------------------------------------------------------------ Markdown
    def markdown(self) -> str:
        """The same without plots."""
        parts = [f"# {self.title}", self._lead()]
        for rows in (self.layers(), [{k: _plain(v) for k, v in row.items()} for row in self.ablation or ()]):
            if rows:
                parts.append(_markdown_table(rows))
        facts = {**self.sampling(), **self.golden(), "plan": self.campaign.plan.fingerprint()}
        parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
        parts.append("\n".join(f"- {text}" for text in self.limitations()))
        return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------ numbers
def _shown(name: str, estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "–"
    if name == "delta_loss":
        return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
    digits = 1 if estimate.high >= 0.1 else 2 if estimate.high >= 0.001 else 4
    value, low, high = (f"{100 * x:.{digits}f}" for x in estimate)
    return f"{value} % [{low}, {high}]"


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**9 else f"{number:.2e}"


def _plain(value: Any) -> str:
    if isinstance(value, Estimate):
        return f"{value.value:.3g} [{value.low:.3g}, {value.high:.3g}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------ pieces of a page
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
.lead { font-size: 1.1rem } img { max-width: 100%; display: block; margin: .8rem 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #555; vertical-align: bottom } th:first-child, td:first-child { text-align: left }
td span { white-space: nowrap }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem }
dt { font-weight: 600 } dd { margin: 0; overflow-wrap: anywhere }
@media print {
  body { margin: 0; max-width: none; font-size: 10pt } h2, img { break-after: avoid; break-inside: avoid }
  tr { break-inside: avoid } .scroll { overflow: visible } table { font-size: 7pt }
  th, td { white-space: normal; padding: .2rem .3rem }
}
"""


def _image(figure: Any, alternative: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/svg+xml;base64,{data}">'


def _table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = ["".join(f"<td>{_cell(str(row.get(name, '')))}</td>" for name in names) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(text: str) -> str:
    """A narrow page breaks between value and interval, not within."""
    value, bracket, rest = escape(text).partition(" [")
    return f"<span>{value}</span> <span>[{rest}</span>" if bracket else value


def _markdown_table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([str(row.get(n, "")) for n in names] for row in rows)]
    cells = [[text.replace("|", "\\|") for text in line] for line in cells]
    width = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, width)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def _definitions(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
