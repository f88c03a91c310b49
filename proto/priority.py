"""The rank of a request's priority: 0 goes first."""

from .common_pb2 import Priority

_RANKS: dict[int, int] = {
    Priority.PRIORITY_INTERACTIVE: 0,
    Priority.PRIORITY_STANDARD: 1,
    Priority.PRIORITY_BATCH: 2,
}
STANDARD_RANK = _RANKS[Priority.PRIORITY_STANDARD]
BATCH_RANK = _RANKS[Priority.PRIORITY_BATCH]
RESUMED_RANK = -1  # of a prompt whose client is in the middle of the answer


def rank_of(priority: int, *, resumes: bool = False) -> int:
    """0 interactive, 1 standard, 2 batch; unspecified, or a value of a newer protocol, is standard.

    What `resumes` an answer goes before all of them, unless it is batch work.
    """
    if resumes and priority != Priority.PRIORITY_BATCH:
        return RESUMED_RANK
    return _RANKS.get(priority, STANDARD_RANK)
