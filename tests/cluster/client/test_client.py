"""What a client makes of its arguments."""

from typing import Any

import pytest

from isthmus.cluster.client.client import build_request
from isthmus.proto.errors import InvalidRequest


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", 99_999_999_999), ("seed", 1 << 70), ("top_k", -1), ("stop_token_ids", [1 << 40])]
)
def test_a_value_that_no_field_holds_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"{name} is .*: value out of range"):
        build_request(prompt="x", sampling={name: value})


def test_sampling_is_passed_on_and_unset_values_are_not() -> None:
    sampling = {"temperature": 0.0, "max_tokens": 3, "stop_token_ids": [1, 2], "seed": None}
    params = build_request(prompt="x", sampling=sampling).sampling
    assert (params.temperature, params.max_tokens, list(params.stop_token_ids)) == (0.0, 3, [1, 2])
    assert params.HasField("temperature") and not params.HasField("seed")
