"""Times that callers name: how long one may be, and what becomes of longer ones.

gRPC adds a timeout to its clock. From about 1e10 seconds on the sum overflows and the call is over before it begins,
which looks like a deadline that has passed.
"""

import math

from ..errors import InvalidRequest

MAX_TIMEOUT_S = 366 * 86_400.0  # of an outgoing call: longer than anything here may take
MAX_ORDER_S = 86_400.0  # that a drain, a flip or a start may be told to take

_OVER_S = -1.0  # a timeout that has passed; of 0 a quick call is still answered


def clamped(timeout_s: float | None) -> float | None:
    """A timeout as gRPC can count it: at most MAX_TIMEOUT_S; None, for no end, stays None."""
    if timeout_s is None:
        return None
    return MAX_TIMEOUT_S if math.isnan(timeout_s) else min(max(timeout_s, _OVER_S), MAX_TIMEOUT_S)


def order_timeout_s(asked_s: float) -> float:
    """The `timeout_s` of an order, if it is one; else InvalidRequest."""
    if not 0 <= asked_s <= MAX_ORDER_S:  # NaN is neither
        raise InvalidRequest(f"timeout_s is {asked_s:g}; allowed: 0 to {MAX_ORDER_S:.0f} seconds")
    return asked_s
