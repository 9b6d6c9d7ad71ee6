"""What the results of a campaign say about all faults it could have injected: estimates, intervals, sample sizes.

The unit of sampling is the fault. A fault of a weight meets many samples and their outcomes go together, so intervals
are made of differences between faults, never between cells (fault × sample): with 200 faults × 64 images a binomial
interval on the cells covers 53, 26 and 20 % at nominal 95 % for intra-fault correlations of 0.1, 0.5 and 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from rom.campaign.records import OUTCOMES
from rom.faults.allocation import neyman
from rom.faults.population import Stratum

RATES = (*OUTCOMES, "mismatch")  # fractions of the cells; "delta_loss" is a mean over the cells that are not due
WEIGHTINGS = ("neuron", "layer", "bit")
_CHUNK = 1 << 22  # resampling weights at a time: 32 MiB


class Estimate(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"rom.campaign: expected a level between 0 and 1, got {level}.")
    return NormalDist().inv_cdf(0.5 + level / 2)


def _t(level: float, degrees: int) -> float:
    """Student's quantile by its expansion in 1/degrees (Abramowitz and Stegun 26.7.5); within 1 % from 4 degrees on."""
    z, v = _z(level), max(degrees, 1)
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)


def _left(n: float, population: int | None) -> float:
    """The finite-population factor of a variance: what sampling without replacement leaves uncertain."""
    if population is None:
        return 1.0
    if population < n:
        raise ValueError(f"rom.campaign: expected a population of at least the {n} faults drawn, got {population}.")
    return (population - n) / (population - 1) if population > 1 else 0.0


# ------------------------------------------------------------------------------------------------ one proportion
def wilson(events: float, n: float, population: int | None = None, level: float = 0.95) -> Estimate:
    """A proportion with its score interval, for `n` independent draws (one cell per fault).

    With a `population` of N, drawn without replacement, the variance p (1 − p) / n shrinks by (N − n) / (N − 1): an
    exhaustive sample has an interval of width 0.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927). At p = 0.002 and
    n = 1000 it covers 95 % where p ± z s covers 86 %, and at no event it is not empty.

    >>> from rom.campaign import statistics
    >>> print(statistics.wilson(0, 1000))
    0 [0, 0.003827]
    """
    if not 0 <= events <= n or n <= 0:
        raise ValueError(f"rom.campaign.wilson: expected 0 to n events of n > 0 draws, got {events} of {n}.")
    return _score(events / n, n / max(_left(n, population), 1e-300), _z(level))


def _score(p: float, n: float, z: float) -> Estimate:
    """|p − p̂| ≤ z √(p (1 − p) / n), solved for p."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))


def rule_of_three(n: int, population: int | None = None, level: float = 0.95) -> float:
    """The largest proportion that n draws without an event leave possible: 1 − (1 − level)^(1/n), about 3 / n.

    Drawn without replacement from N it is at most (1 − (n − 1) / 2N) of that, for Π (1 − K / (N − i)) is below
    (1 − K / mean(N − i))^n; and 0 when n = N.

    Source: Hanley and Lippman-Hand, "If nothing goes wrong, is everything all right?" (1983).

    >>> from rom.campaign import statistics
    >>> round(statistics.rule_of_three(1000), 5)
    0.00299
    """
    if n < 1 or (population is not None and population < n):
        raise ValueError(f"rom.campaign.rule_of_three: expected 1 to {population} draws, got {n}.")
    if population == n:
        return 0.0
    _z(level)
    shrink = 1.0 if population is None else 1 - (n - 1) / (2 * population)
    return shrink * -math.expm1(math.log1p(-level) / n)


def sample_size(margin: float, population: int | None = None, level: float = 0.95, p: float = 0.5) -> int:
    """Faults needed to know a proportion near p to ± `margin`, n = N / (1 + e² (N − 1) / (z² p (1 − p))).

    p = 0.5 is the worst case. Source: Leveugle et al., "Statistical fault injection: quantified error and confidence"
    (DATE 2009), eq. 4.

    >>> from rom.campaign import statistics
    >>> statistics.sample_size(0.01), statistics.sample_size(0.001, population=1_000_000)
    (9604, 489892)
    """
    if not (0 < margin < 1 and 0 < p < 1) or (population is not None and population < 1):
        raise ValueError(f"rom.campaign.sample_size: expected 0 < margin, p < 1, got {margin}, {p} (of {population}).")
    endless = _z(level) ** 2 * p * (1 - p) / margin**2
    return math.ceil(endless if population is None else population / (1 + (population - 1) / endless))


# ------------------------------------------------------------------------------------------------ clusters of cells
def columns(results: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(totals, cells) of every fault for one of RATES or "delta_loss": the quantity is Σ totals / Σ cells."""
    if name not in (*RATES, "delta_loss"):
        raise ValueError(f"rom.campaign: expected a quantity of {', '.join(RATES)}, delta_loss, got {name!r}.")
    cells = results["cells"] - results["due"] if name == "delta_loss" else results["cells"]
    return results[name].astype(np.float64), cells.astype(np.float64)


def _ratio_and_variance(totals: np.ndarray, cells: np.ndarray) -> tuple[float, float]:
    """Σ totals / Σ cells and its variance between faults, linearised (Cochran, "Sampling techniques", eq. 2.45)."""
    n, size = len(totals), cells.sum()
    if size == 0:
        return math.nan, math.nan
    value = totals.sum() / size
    spread = np.square(totals - value * cells).sum() / size**2
    return float(value), float(spread * n / (n - 1)) if n > 1 else math.inf


def clustered(totals: np.ndarray, cells: np.ndarray, population: int | None = None, level: float = 0.95) -> Estimate:
    """A rate Σ totals / Σ cells with a score interval on the effective number of cells, p (1 − p) / variance.

    totals, cells: events and samples per fault. population: faults there are. Without any event (or with nothing else)
    the faults do not tell how alike their cells are: each fault then counts as one draw.

    Source: Korn and Graubard, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data" (1998), with Wilson's interval in place of Clopper and Pearson's.

    >>> from rom.campaign import statistics
    >>> print(statistics.clustered(np.array([64, 0, 0, 0, 0, 64, 0, 0, 0, 0]), np.full(10, 64)))
    0.2 [0.0446, 0.5724]
    """
    n = len(totals)
    rate, variance = _ratio_and_variance(totals, cells)
    if math.isnan(rate):
        return Estimate(math.nan, 0.0, 1.0)
    effective = float(n)
    if 0 < variance < math.inf:
        effective = min(max(rate * (1 - rate) / variance, 1.0), float(cells.sum()))
    return _score(rate, effective / max(_left(n, population), 1e-300), _t(level, n - 1))


def bootstrap(
    totals: np.ndarray,
    cells: np.ndarray,
    population: int | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Σ totals / Σ cells with the percentile interval of samples of faults drawn with replacement; seeded.

    For means of heavy tails such as |Δloss|. For rates take `clustered`: a sample without an event has no spread to
    resample. The interval is drawn in by √((N − n) / (N − 1)) for a `population` of N faults.

    Source: Davison and Hinkley, "Bootstrap methods and their application" (1997), 3.8.
    """
    return stratified_bootstrap([(totals, cells)], [1.0], [population], level, resamples, seed)


def stratified_bootstrap(
    strata: Sequence[tuple[np.ndarray, np.ndarray]],
    weights: Sequence[float],
    populations: Sequence[int | None] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Σ_h W_h (Σ totals_h / Σ cells_h), faults resampled within their strata.

    An upper limit for strata in which no fault changed the loss does not exist: a mean without a bound can hide
    anything behind the next fault. Look at their rates.
    """
    tail = (1 - level) / 2
    _z(level)
    rng = np.random.default_rng(seed)
    value, deviation = 0.0, np.zeros(resamples)
    for (totals, cells), weight, population in zip(strata, weights, populations or [None] * len(strata)):
        mean, _ = _ratio_and_variance(totals, cells)
        if math.isnan(mean):
            return Estimate(math.nan, math.nan, math.nan)
        shrink = math.sqrt(_left(len(totals), population))
        value += weight * mean
        deviation += weight * shrink * (_resampled(totals, cells, resamples, rng, mean) - mean)
    low, high = np.quantile(value + deviation, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def _resampled(
    totals: np.ndarray, cells: np.ndarray, resamples: int, rng: np.random.Generator, mean: float
) -> np.ndarray:
    """The ratio in every resample; a resample whose faults have no cells keeps the mean."""
    out, n = np.empty(resamples), len(totals)
    both = np.stack([totals, cells], 1)
    step = max(1, _CHUNK // n)
    for begin in range(0, resamples, step):
        count = min(step, resamples - begin)
        drawn = rng.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        sums = times @ both
        out[begin : begin + count] = np.divide(sums[:, 0], sums[:, 1], out=np.full(count, mean), where=sums[:, 1] > 0)
    return out


# ------------------------------------------------------------------------------------------------ strata
def weights(strata: Sequence[Stratum], by: str) -> np.ndarray:
    """The weight of every stratum in an overall figure, adding up to 1. What "overall" means is a choice:

    "neuron": every fault counts the same, so that large layers decide. "layer": every layer counts the same, and every
    fault within it. "bit": every bit position counts the same, and every fault of it; needs strata of one bit each
    (`Stratum.by_bit`), or ValueError.
    """
    sizes = np.array([float(s.size) for s in strata])
    if by == "neuron":
        return sizes / sizes.sum()
    if by == "layer":
        groups: list[Any] = [s.layer for s in strata]
    elif by == "bit":
        if any(len(s.bits) > 1 for s in strata):
            raise ValueError(
                "rom.campaign.weights: expected strata of one bit each for 'bit', got several bits in one."
            )
        groups = [s.bits for s in strata]
    else:
        raise ValueError(f"rom.campaign.weights: expected one of {', '.join(WEIGHTINGS)}, got {by!r}.")
    kinds = sorted(set(groups))
    group = np.array([kinds.index(g) for g in groups])
    return sizes / np.bincount(group, sizes)[group] / len(kinds)


def stratified(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Σ W_h p_h of independent strata, with limits p ± √Σ W_h² (limit_h − p_h)².

    Each side is recovered from the strata's own limits, so that a stratum without an event, whose estimated variance is
    0, still widens the upper limit by what its faults leave possible.

    Source: Zou and Donner, "Construction of confidence limits about effect measures" (2008).

    >>> from rom.campaign import statistics
    >>> print(statistics.stratified([statistics.wilson(30, 100), statistics.wilson(0, 50)], [0.1, 0.9]))
    0.03 [0.02189, 0.09492]
    """
    w = np.asarray(weights, np.float64)
    p, low, high = np.array(parts, np.float64).reshape(-1, 3).T
    if w.shape != p.shape or not np.isfinite(p).all():
        raise ValueError(f"rom.campaign.stratified: expected a weight and a finite value per stratum, got {w.shape}.")
    value = float(w @ p)
    return Estimate(
        value, value - math.sqrt(np.square(w * (p - low)).sum()), value + math.sqrt(np.square(w * (high - p)).sum())
    )


def second_stage(
    strata: Sequence[Stratum], pilot: np.ndarray, total: int, name: str = "mismatch", by: str = "neuron"
) -> list[int]:
    """How many faults each stratum gets after a pilot: Neyman's allocation of least variance for the overall rate.

    strata: those of the plan. pilot: RESULT rows, some of every stratum. total: faults in all, the pilot's included.
    name: the rate to know well; by: how strata are weighted (`weights`). The pilot's faults stay, so no stratum gets
    fewer: `plan.extended(second_stage(…))` continues. σ_h is √(p (1 − p)) of (events + 1) / (faults + 2), not 0 for a
    stratum that has shown nothing yet. For faults that meet several samples it is an upper bound.

    Source: Neyman (1934), and Cochran, "Sampling techniques", 5.5, for the two stages.
    """
    drawn = np.bincount(pilot["stratum"], minlength=len(strata))
    if not drawn.all():
        raise ValueError(
            f"rom.campaign.second_stage: expected faults of every stratum, got none of {int(drawn.argmin())}."
        )
    if total < drawn.sum():
        raise ValueError(
            f"rom.campaign.second_stage: expected a total of at least the pilot's {drawn.sum()}, got {total}."
        )
    totals, cells = columns(pilot, name)
    rate = np.divide(totals, cells, out=np.zeros_like(totals), where=cells > 0)
    p = (np.bincount(pilot["stratum"], rate, len(strata)) + 1) / (drawn + 2)
    spread = weights(strata, by) * np.sqrt(p * (1 - p)) / np.array([s.size for s in strata])  # neyman multiplies N_h
    counts = drawn.copy()
    free = np.arange(len(strata))
    while len(free):  # strata whose share is below what they have keep that, and the rest is shared again
        budget = total - int(counts.sum() - counts[free].sum())
        share = np.array(neyman([strata[int(h)].size for h in free], spread[free].tolist(), budget, floor=0))
        kept = share < drawn[free]
        if not kept.any():
            counts[free] = share
            break
        free = free[~kept]
    return [int(count) for count in counts]


# ------------------------------------------------------------------------------------------------ two campaigns
def ratio(
    baseline: tuple[np.ndarray, np.ndarray], ours: tuple[np.ndarray, np.ndarray], level: float = 0.95
) -> Estimate:
    """Mean of the baseline over mean of ours, e.g. of |Δloss|, each given as (totals, cells) per fault (`columns`).

    The interval is symmetric in the logarithm: SE² = var_b / m_b² + var_o / m_o² (delta method). Both means must be
    above 0, or the ratio is nan with the interval (0, inf).
    """
    (m_b, var_b), (m_o, var_o) = _ratio_and_variance(*baseline), _ratio_and_variance(*ours)
    if not (m_b > 0 and m_o > 0):
        return Estimate(math.nan, 0.0, math.inf)
    half = _z(level) * math.sqrt(var_b / m_b**2 + var_o / m_o**2)
    return Estimate(m_b / m_o, m_b / m_o * math.exp(-half), m_b / m_o * math.exp(half))


def geometric_mean(ratios: Sequence[Estimate]) -> Estimate:
    """The mean of ratios over several nets, and its interval at the ratios' own level.

    It says how well the mean of *these* nets is known, not what another net would show. An arithmetic mean of ratios
    depends on which side is called the baseline (the published 5.5 × is one; of the same nets, 4.0 × is geometric).
    """
    if not ratios or not all(r.low > 0 and math.isfinite(r.high) for r in ratios):
        raise ValueError("rom.campaign.geometric_mean: expected ratios with limits above 0 and below infinity.")
    logs = np.log(np.array(ratios))
    mean = logs[:, 0].mean()
    half = math.sqrt(np.square(logs[:, 2] - logs[:, 1]).sum()) / 2 / len(ratios)
    return Estimate(*(float(np.exp(x)) for x in (mean, mean - half, mean + half)))


# ------------------------------------------------------------------------------------------------ stopping
@dataclass(frozen=True)
class Schedule:
    """When a campaign may stop: at these numbers of faults, fixed beforehand, as soon as the interval is narrow enough.

    Whoever looks after every fault and stops when it suits finds an interval that misses more often than it says. With
    K looks, each uses the level 1 − α / K (Bonferroni): all K intervals hold together with probability 1 − α, so the
    one at which the campaign stops does, whatever the rule and however the looks depend on each other. Pocock's
    boundary would be narrower by 7 % at K = 5 (z = 2.41 for 2.58), but its constants assume normal increments, which
    rates near 0 and heavy-tailed losses do not have.

    >>> from rom.campaign import statistics
    >>> schedule = statistics.Schedule.doubling(1000, 10_000)
    >>> schedule.looks, round(schedule.level_of_each, 4)
    ((1000, 2000, 4000, 8000, 10000), 0.99)
    """

    looks: tuple[int, ...]
    level: float = 0.95

    def __post_init__(self) -> None:
        _z(self.level)
        if not self.looks or self.looks[0] < 1 or any(a >= b for a, b in zip(self.looks, self.looks[1:])):
            raise ValueError(f"rom.campaign.Schedule: expected ascending numbers of faults, got {self.looks}.")

    @classmethod
    def doubling(cls, first: int, last: int, level: float = 0.95) -> Schedule:
        """Looks at first, 2 first, 4 first, … and last: few looks, and at most twice the faults needed."""
        looks = [first]
        while looks[-1] < last:
            looks.append(min(2 * looks[-1], last))
        return cls(tuple(looks), level)

    @property
    def level_of_each(self) -> float:
        """The level for the interval of one look."""
        return 1 - (1 - self.level) / len(self.looks)

    def after(self, faults: int) -> int | None:
        """The next look, None after the last."""
        return next((look for look in self.looks if look > faults), None)

    def stops(self, faults: int, estimate: Estimate, margin: float) -> bool:
        """Whether to: it is the last look, or a look and the interval (of `level_of_each`) is within ± margin."""
        return faults >= self.looks[-1] or (
            faults in self.looks and max(estimate.high - estimate.value, estimate.value - estimate.low) <= margin
        )


# ------------------------------------------------------------------------------------------------ a campaign
def estimates(
    results: np.ndarray, population: int | None = None, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, Estimate]:
    """Every rate of RATES and "delta_loss" of RESULT rows that are a simple random sample of faults."""
    out = {name: clustered(*columns(results, name), population, level) for name in RATES}
    totals, cells = columns(results, "delta_loss")
    return out | {"delta_loss": bootstrap(totals, cells, population, level, resamples, seed)}


def overall(
    results: np.ndarray,
    strata: Sequence[Stratum],
    by: str,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The same for faults drawn per stratum, weighted as `by` says (see `weights`).

    Strata without a fault are left out, and the weights of the others made to add up to 1 again.
    """
    seen = [h for h in range(len(strata)) if (results["stratum"] == h).any()]
    w = weights(strata, by)[seen]
    w = w / w.sum()
    rows = [results[results["stratum"] == h] for h in seen]
    sizes = [strata[h].size for h in seen]
    out = {}
    for name in RATES:
        out[name] = stratified([clustered(*columns(r, name), n, level) for r, n in zip(rows, sizes)], w.tolist())
    losses = [columns(r, "delta_loss") for r in rows]
    return out | {"delta_loss": stratified_bootstrap(losses, w.tolist(), sizes, level, resamples, seed)}
