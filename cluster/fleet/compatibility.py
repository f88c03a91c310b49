"""Which workers the gateway may use, and in one line why not: a pure function of their reports."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...proto.worker_pb2 import WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, WorkerReport

_CALIBRATED_APART = (
    "calibrated apart: write one file with `isthmus calibrate MODEL --out FILE`, set `balance: FILE` for all workers, "
    "and restart them"
)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What every worker must agree on with the gateway."""

    protocol_version: int
    model: str
    fingerprint: str


def incompatible(reports: Mapping[str, WorkerReport], expected: Expected) -> dict[str, str]:
    """Why a worker must not be paired, by its key in `reports`; workers that may be are left out."""
    reasons = {
        key: reason for key, report in reports.items() if (reason := _unlike_gateway(report, expected)) is not None
    }
    sound = {key: report for key, report in reports.items() if key not in reasons}
    for key, report in sound.items():
        others = [other for other in sound.values() if other.role != report.role]
        if others and not any(_share_codec(report, other) for other in others):
            reasons[key] = _why_no_codec(report, others)
    return reasons


def _unlike_gateway(report: WorkerReport, expected: Expected) -> str | None:
    if report.role not in (WORKER_ROLE_PREFILL, WORKER_ROLE_DECODE):
        return "tells no role that this gateway knows"
    if report.protocol_version != expected.protocol_version:
        return f"speaks protocol {report.protocol_version}, the gateway speaks {expected.protocol_version}"
    if report.model.fingerprint != expected.fingerprint:
        theirs, ours = _short(report.model.fingerprint), _short(expected.fingerprint)
        return f"runs model {report.model.name} ({theirs}), the gateway serves {expected.model} ({ours})"
    return None


def _share_codec(one: WorkerReport, other: WorkerReport) -> bool:
    return one.page_tokens == other.page_tokens and any(
        other.codecs.get(name) == params for name, params in one.codecs.items()
    )


def _why_no_codec(report: WorkerReport, others: list[WorkerReport]) -> str:
    role = "decode" if report.role == WORKER_ROLE_PREFILL else "prefill"
    if all(other.page_tokens != report.page_tokens for other in others):
        theirs = ", ".join(sorted({str(other.page_tokens) for other in others}))
        return f"has pages of {report.page_tokens} tokens, the {role} workers have {theirs}"
    common = sorted(set(report.codecs).intersection(*(other.codecs for other in others)))
    if not common:
        names = sorted({name for other in others for name in other.codecs})
        return f"has codecs {', '.join(sorted(report.codecs))}; the {role} workers have {', '.join(names)}"
    name = common[0]
    hashes = sorted({_short(other.codecs[name]) for other in others})
    ours, theirs = _short(report.codecs[name]), ", ".join(hashes)
    hint = f" ({_CALIBRATED_APART})" if name.startswith("tq-") else ""
    return f"codec {name} has parameters {ours}, the {role} workers have {theirs}{hint}"


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"
