"""How many faults to draw from each stratum."""

from __future__ import annotations

from collections.abc import Sequence


def neyman(sizes: Sequence[int], deviations: Sequence[float], total: int, floor: int = 1) -> list[int]:
    """The allocation of least variance: n_h ∝ N_h σ_h, at least `floor` and at most N_h each.

    sizes: N_h, times any weight of the stratum. deviations: σ_h, as √(p (1 − p)) of a pilot run. Strata whose share
    exceeds N_h are taken whole and the rest is shared again; remainders go to the largest fractions, so the numbers add
    up to min(total, Σ N_h). Raises ValueError if `total` is below the floors.

    Source: Neyman, "On the two different aspects of the representative method" (1934).

    >>> rom.faults.neyman([1000, 1000, 10], [0.5, 0.1, 0.5], total=100)
    [83, 16, 1]
    """
    if len(sizes) != len(deviations) or not sizes:
        raise ValueError(f"rom.faults.neyman: expected a deviation per size, got {len(deviations)} for {len(sizes)}.")
    if min(sizes) < 1 or min(deviations) < 0:
        raise ValueError("rom.faults.neyman: expected sizes of at least 1 and deviations of at least 0.")
    least = [min(floor, size) for size in sizes]
    total = min(total, sum(sizes))
    if total < sum(least):
        raise ValueError(
            f"rom.faults.neyman: expected a total of at least {sum(least)} (floor {floor} in {len(sizes)} strata), "
            f"got {total}."
        )
    counts: dict[int, int] = {}
    while True:  # every pass settles the strata that leave their range; at most one pass per stratum
        rest = [h for h in range(len(sizes)) if h not in counts]
        budget = total - sum(counts.values())
        weights = [sizes[h] * deviations[h] for h in rest]
        if not any(weights):
            weights = [float(sizes[h]) for h in rest]
        shares = {h: budget * w / sum(weights) for h, w in zip(rest, weights)} if rest else {}
        low = {h: least[h] for h in rest if shares[h] < least[h]}
        settled = low or {h: sizes[h] for h in rest if shares[h] > sizes[h]}
        if not settled:
            break
        counts |= settled
    counts |= {h: int(share) for h, share in shares.items()}
    by_fraction = sorted(shares, key=lambda h: (int(shares[h]) - shares[h], h))
    return _spread(counts, total, by_fraction, sizes)


def _spread(counts: dict[int, int], total: int, first: list[int], sizes: Sequence[int]) -> list[int]:
    """Gives what rounding left over, one by one, or takes back what the floors took too much."""
    missing = total - sum(counts.values())
    others = [h for h in sorted(counts, key=lambda h: -sizes[h]) if h not in first]
    while missing > 0:
        for h in first + others:
            if missing and counts[h] < sizes[h]:
                counts[h] += 1
                missing -= 1
    return [counts[h] for h in range(len(sizes))]
