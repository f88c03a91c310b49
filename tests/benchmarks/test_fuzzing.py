"""The parts of `benchmarks/fuzz.py` (`make test-fuzz` runs it for a minute)."""

import random
from pathlib import Path

import pytest
from fuzzing import http2
from fuzzing.inputs import SAVED, Input, Outcome
from fuzzing.methods import methods_of, our_services
from fuzzing.values import Values, parsed
from support import raw_grpc

from isthmus.proto.common_pb2 import SamplingParams
from isthmus.proto.jobs_pb2 import SubmitJobRequest


def test_every_method_of_every_service_is_called_somewhere() -> None:
    one_each = {
        "gateway": "g:1",
        "admin": "a:1",
        "prefill": "p:1",
        "decode": "d:1",
        "supervisor": "v:1",
        "orders": "o:1",
    }
    methods = methods_of(**one_each, spares=["s:1", "s:2"], sockets=["unix:w"], probes=["h:1"])
    ours = {f"/{service.full_name}/{method.name}" for service in our_services() for method in service.methods}
    paths = {method.path for method in methods}
    assert len(ours) > 20
    assert ours == {path for path in paths if path.startswith("/isthmus.")}
    assert {path for path in paths if path.startswith("/grpc.")} >= {"/grpc.health.v1.Health/Check"}
    orders = {method.path.rpartition("/")[2]: method.addresses for method in methods if "o:1" in method.addresses}
    assert set(orders) == {"DrainWorker", "FlipWorker", "Scale"}


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


@pytest.mark.parametrize("name", sorted(http2.HTTP2))
def test_bytes_begin_as_a_client_of_grpc_does_and_each_seed_draws_the_same(name: str) -> None:
    drawn = [http2.HTTP2[name](random.Random(seed), "/a/B", b"message") for seed in range(30)]
    assert drawn == [http2.HTTP2[name](random.Random(seed), "/a/B", b"message") for seed in range(30)]
    assert len(set(drawn)) > 3
    assert all(data.startswith(raw_grpc.PREFACE) and len(data) < 4 * http2.LARGEST for data in drawn)


def test_what_broke_something_is_kept_and_read_again(tmp_path: Path) -> None:
    outcome = Outcome(7, tmp_path / "kept")
    sent = [Input(kind="raw", target="gateway", what="noise", number=n, data=bytes((n, 255))) for n in range(100)]
    for made in sent:
        outcome.sent(made)
    outcome.crashed("gateway ended with -11", "gateway")
    (path,) = (tmp_path / "kept").iterdir()
    assert str(path) in outcome.crashes[0]
    assert [Input.of_line(line) for line in path.read_text().splitlines()] == sent[-60:]
    for _ in range(SAVED + 5):
        outcome.failed("odd", sent[0])
    assert len(list((tmp_path / "kept").iterdir())) == SAVED
