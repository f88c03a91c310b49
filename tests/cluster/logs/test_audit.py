"""The audit log: admin actions and refused callers, on stderr and in a file of its own."""

import json
import logging
import stat
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from scripted import says, scripted_cluster

from isthmus.cluster.client.client import Client
from isthmus.cluster.logs.admin import who_calls
from isthmus.cluster.logs.audit import audit
from isthmus.cluster.logs.configure import configure_logs
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.worker_pb2 import WORKER_ROLE_DECODE, DrainWorkerRequest, FlipWorkerRequest, ScaleRequest


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_is_its_owner_s_alone_and_only_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "audit.jsonl"
    configure_logs("error", "json", str(path))
    audit("admin", who="loopback", what="Scale", prefill=3)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    configure_logs("error", "text", str(path))
    audit("refused", who="10.0.0.7", what="/x/Y", reason="unknown", key_id="")
    logging.getLogger("isthmus.cluster").error("something else")
    first, second = lines(path)
    assert {name: first[name] for name in ("level", "logger", "event", "who", "what", "prefill")} == {
        "level": "info",
        "logger": "isthmus.audit",
        "event": "admin",
        "who": "loopback",
        "what": "Scale",
        "prefill": 3,
    }
    assert (second["event"], second["reason"], "key_id" in second) == ("refused", "unknown", False)
    err = capsys.readouterr().err
    assert "refused" in err  # whatever the level of other lines
    assert "something else" in err


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"before": 1}\n')
    path.chmod(0o644)
    configure_logs("error", "json", str(path))
    audit("admin", who="loopback", what="Scale")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert lines(path)[0] == {"before": 1}


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    configure_logs("error", "json", str(path))
    audit("admin", who="loopback", what="first")
    path.rename(tmp_path / "old")
    audit("admin", who="loopback", what="second")
    assert [entry["what"] for entry in lines(path)] == ["second"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"audit_file .* cannot be written: Is a directory"):
        configure_logs("error", "json", str(tmp_path))


async def test_orders_are_audited_with_who_and_how_they_ended(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "isthmus.audit")
    async with (
        scripted_cluster(says("x")) as cluster,
        Client(cluster.gateway.address, admin=cluster.gateway.admin_address) as client,
    ):
        await client.status()
        for call in (
            client.cluster.DrainWorker(DrainWorkerRequest(worker="nobody", timeout_s=1)),
            client.cluster.FlipWorker(FlipWorkerRequest(worker="prefill-0", role=WORKER_ROLE_DECODE)),
            client.cluster.Scale(ScaleRequest(prefill=3, decode=2000)),
        ):
            with pytest.raises(grpc.aio.AioRpcError):
                await call
    audited = [vars(entry)["fields"] for entry in caplog.records if entry.name == "isthmus.audit"]
    base = {"event": "admin", "who": "loopback"}
    assert sorted(audited, key=lambda fields: fields["what"]) == [
        {**base, "what": "DrainWorker", "outcome": "NOT_FOUND", "worker": "nobody", "timeout_s": 1.0},
        {
            **base,
            "what": "FlipWorker",
            "outcome": "FAILED_PRECONDITION",
            "worker": "prefill-0",
            "role": "WORKER_ROLE_DECODE",
        },
        {**base, "what": "Scale", "outcome": "INVALID_ARGUMENT", "prefill": 3, "decode": 2000},
    ]


class Context:
    """Of a call, as far as who makes it."""

    def __init__(self, peer: str, *uris: str) -> None:
        self._peer, self._uris = peer, uris

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, Any]:
        return {"peer_uri": [uri.encode() for uri in self._uris]}


@pytest.mark.parametrize(
    ("context", "who"),
    [
        (Context("ipv4:127.0.0.1:5"), "loopback"),
        (Context("ipv6:%5B::1%5D:5"), "loopback"),
        (Context("unix:/run/x"), "loopback"),
        (Context("ipv4:10.0.0.7:5"), "ipv4:10.0.0.7:5"),
        (Context("ipv4:10.0.0.7:5", "isthmus://prod/admin/alice"), "isthmus://prod/admin/alice"),
        (Context("ipv4:127.0.0.1:5", "https://x", "isthmus://prod/admin/bob"), "isthmus://prod/admin/bob"),
        (Context("ipv4:10.0.0.7:5", "https://x"), "ipv4:10.0.0.7:5"),
    ],
)
def test_who_calls(context: Any, who: str) -> None:
    assert who_calls(context) == who


def test_a_name_in_the_dns_names_of_a_certificate_is_told_too() -> None:
    context: Any = Context("ipv4:10.0.0.7:5")
    context.auth_context = lambda: {"peer_dns": [b"admin.prod.isthmus.internal"], "x509_common_name": [b"alice"]}
    assert who_calls(context) == "isthmus://prod/admin/alice"
