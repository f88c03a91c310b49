"""Some hundred calls of the fuzzer (`make test-fuzz` makes 20,000), and its own parts."""

import random

from fuzz import fuzz
from fuzz_fleet import OURS
from fuzz_values import Values, parsed

from isthmus.proto.common_pb2 import SamplingParams
from isthmus.proto.jobs_pb2 import SubmitJobRequest


async def test_no_call_makes_a_server_fail_or_keeps_anything() -> None:
    outcome = await fuzz(600, seed=1)
    assert outcome.failures == []
    assert (outcome.calls, outcome.canaries >= 4) == (600, True)
    ours = [service for module in OURS for service in module.DESCRIPTOR.services_by_name.values()]
    assert {method for method, _ in outcome.answers} >= {
        f"/{service.full_name}/{method.name}" for service in ours for method in service.methods
    }


def test_every_field_of_a_request_is_set_sooner_or_later_and_each_seed_draws_the_same() -> None:
    for kind in (SamplingParams.DESCRIPTOR, SubmitJobRequest.DESCRIPTOR):
        drawn = [Values(random.Random(seed), {}).message(kind) for seed in range(50)]
        assert {field.name for made in drawn for field, _ in made.ListFields()} == set(kind.fields_by_name)
        again = [Values(random.Random(seed), {}).message(kind) for seed in range(50)]
        assert [str(made) for made in drawn] == [str(made) for made in again]


def test_requests_are_anything_valid_changed_or_damaged() -> None:
    kind, valid = SubmitJobRequest.DESCRIPTOR, SubmitJobRequest(tenant="t", idempotency_key="key" * 10)
    drawn = [Values(random.Random(seed), {}).request(kind, [valid]) for seed in range(300)]
    read = [parsed(kind, data) for data in drawn]
    assert 10 < sum(made is None for made in read) < 150
    assert 10 < sum(made == valid for made in read) < 150
