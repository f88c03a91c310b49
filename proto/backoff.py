"""How long to wait before the next try."""

_MOST_DOUBLINGS = 32  # more would tell nothing, and overflow one day: whoever is away may be away for hours


def backoff_s(failures: int, first_s: float, last_s: float) -> float:
    """`first_s` after the first failure, twice as long after each further one, at most `last_s`."""
    return min(first_s * 2 ** min(failures - 1, _MOST_DOUBLINGS), last_s)
