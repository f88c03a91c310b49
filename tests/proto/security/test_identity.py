"""Names in certificates."""

import pytest

from isthmus.proto.errors import InvalidRequest
from isthmus.proto.security.identity import Identity, identities_of, identity, server_names


def test_a_name_is_read_as_it_was_written() -> None:
    for name in ("decode-0", "a b/c", "ü", "x" * 200):
        each = identity("prod", "decode", name)
        assert Identity.parse(str(each)) == each
        assert str(each).isascii()


@pytest.mark.parametrize(
    "uri",
    [
        *("", "isthmus://", "isthmus://prod", "isthmus://prod/decode", "isthmus://prod/decode/", "isthmus:///decode/x"),
        *("isthmus://prod/boss/x", "isthmus://Prod/decode/x", "isthmus://prod/decode/x/y", "https://prod/decode/x"),
        *(" isthmus://prod/decode/x", "ISTHMUS://prod/decode/x", "prod/decode/x", "isthmus://prod/Decode/x"),
        *("isthmus://prod\n/decode/x", "isthmus://-prod/decode/x"),
    ],
)
def test_what_is_no_name_is_nobody(uri: str) -> None:
    with pytest.raises(InvalidRequest):
        Identity.parse(uri)
    assert identities_of({"peer_uri": [uri.encode()]}) == []


def test_only_uris_of_a_certificate_count() -> None:
    name = b"isthmus://prod/gateway/x"
    assert identities_of({"x509_common_name": [name], "peer_dns": [name], "x509_subject": [name]}) == []
    assert identities_of({}) == []
    assert identities_of({"peer_uri": [b"\xff", b"spiffe://x/y", name]}) == [Identity("prod", "gateway", "x")]


def test_workers_have_one_more_name_to_be_dialled_by() -> None:
    roles = [Identity("prod", "prefill", "x"), Identity("prod", "decode", "x")]
    assert server_names(roles) == [f"{role}.prod.isthmus.internal" for role in ("prefill", "worker", "decode")]
    assert server_names([Identity("prod", "gateway", "x")]) == ["gateway.prod.isthmus.internal"]
