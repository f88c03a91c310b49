"""Workers that must not be paired are told apart, with the reason."""

from typing import Any

import pytest
from scripted import CODECS, FINGERPRINT, report_of

from isthmus.cluster.fleet.compatibility import Requirements, incompatibilities
from isthmus.cluster.fleet.report import Report
from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.proto.worker_pb2 import WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, WORKER_ROLE_UNSPECIFIED, ModelReport

REQUIRED = Requirements(protocol_version=PROTOCOL_VERSION, model="bytes", fingerprint=FINGERPRINT)


def reasons(**changes: Any) -> dict[str, str]:
    reports = {
        "p": report_of(WORKER_ROLE_PREFILL),
        "d": report_of(WORKER_ROLE_DECODE),
        "odd": report_of(**{"role": WORKER_ROLE_DECODE, **changes}),
    }
    return incompatibilities({name: Report.from_pb(report) for name, report in reports.items()}, REQUIRED)


def test_equal_workers_pair() -> None:
    assert reasons() == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"role": WORKER_ROLE_UNSPECIFIED}, "tells no role that the gateway knows"),
        ({"protocol_version": 99}, f"speaks protocol 99, the gateway speaks {PROTOCOL_VERSION}"),
        (
            {"model": ModelReport(name="other", fingerprint="abc")},
            "runs model other (abc), the gateway serves bytes (ffffffffffff)",
        ),
        ({"page_tokens": 32}, "has pages of 32 tokens, the prefill workers have 64"),
        ({"codecs": {"fp8": "x"}}, "has codecs fp8; the prefill workers have raw, tq-k4v4"),
        ({"codecs": {"raw": "r1"}}, "codec raw has parameters r1, the prefill workers have r0"),
        (
            {"codecs": {"tq-k4v4": "t1"}},
            "codec tq-k4v4 has parameters t1, the prefill workers have t0 (calibrated apart: write one file with "
            "`isthmus calibrate MODEL --out FILE`, set `balance: FILE` for all workers, and restart them)",
        ),
    ],
)
def test_each_difference_has_its_reason(changes: dict[str, Any], reason: str) -> None:
    assert reasons(**changes) == {"odd": reason}


def test_one_common_codec_is_enough() -> None:
    assert reasons(codecs={**CODECS, "raw": "r1"}) == {}


def test_without_another_role_nobody_is_blamed() -> None:
    report = Report.from_pb(report_of(WORKER_ROLE_DECODE, codecs={"fp8": "x"}))
    assert incompatibilities({"d": report}, REQUIRED) == {}
