"""One cost for each row of a role's columns: a list where rows are few, as plain numbers are faster then, else a
vector."""

from collections.abc import Iterable
from itertools import repeat

import numpy as np

from .worker_columns import Floats

MANY = 64  # rows past which a vector is faster than a list

Costs = list[float] | Floats


def as_costs(vector: Floats) -> Costs:
    """The same costs, as a list where they are few."""
    return vector.tolist() if len(vector) <= MANY else vector


def minimum(costs: Costs) -> float:
    """The least cost."""
    return min(costs) if isinstance(costs, list) else costs.item(costs.argmin())


def add_minimum(costs: Costs, one: Costs | float, other: Costs | float) -> Costs:
    """To each cost the lesser of two others added, which may be the same for all rows."""
    if isinstance(costs, list):
        return [cost + (a if a < b else b) for cost, a, b in zip(costs, _each(one), _each(other), strict=False)]
    return costs + np.minimum(one, other)


def _each(costs: Costs | float) -> Iterable[float]:
    return repeat(costs) if isinstance(costs, (float, int)) else costs


def rows_up_to(costs: Costs, bound: float) -> list[int]:
    """The rows whose cost is no more than that."""
    if isinstance(costs, list):
        return [row for row, cost in enumerate(costs) if cost <= bound]
    return (costs <= bound).nonzero()[0].tolist()


def cheapest_rows(costs: Costs, count: int) -> list[int]:
    """So many rows, the cheapest first; all where there are fewer."""
    if isinstance(costs, list):
        return sorted(range(len(costs)), key=costs.__getitem__)[:count]
    rows = np.argpartition(costs, count - 1)[:count]
    return rows[costs[rows].argsort(kind="stable")].tolist()
