"""The rank of a request's priority: 0 goes first."""

from .common_pb2 import Priority

_RANKS: dict[int, int] = {
    Priority.PRIORITY_INTERACTIVE: 0,
    Priority.PRIORITY_STANDARD: 1,
    Priority.PRIORITY_BATCH: 2,
}
STANDARD_RANK = _RANKS[Priority.PRIORITY_STANDARD]


def rank_of(priority: int) -> int:
    """0 interactive, 1 standard, 2 batch; unspecified, or a value of a newer protocol, is standard."""
    return _RANKS.get(priority, STANDARD_RANK)
