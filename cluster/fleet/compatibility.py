"""Which workers the gateway may use, and in one line why not: a pure function of their reports."""

from collections.abc import Mapping
from dataclasses import dataclass

from .report import Report

_CALIBRATED_APART = (
    "calibrated apart: write one file with `isthmus calibrate MODEL --out FILE`, set `balance: FILE` for all workers, "
    "and restart them"
)


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What every worker must have in common with the gateway, or the supervisor."""

    protocol_version: int
    model: str = ""
    fingerprint: str | None = None  # of the model; None: any
    by: str = "the gateway"  # whose this is


def incompatibilities(reports: Mapping[str, Report], required: Requirements) -> dict[str, str]:
    """Why a worker must not be paired, by its key in `reports`; workers that may be are left out."""
    reasons = {key: reason for key, report in reports.items() if (reason := _mismatch(report, required)) is not None}
    usable = {key: report for key, report in reports.items() if key not in reasons}
    for key, report in usable.items():
        others = [other for other in usable.values() if other.role != report.role]
        if others and not any(share_codec(report, other) for other in others):
            reasons[key] = _why_no_codec(report, others)
    return reasons


def share_codec(one: Report, other: Report) -> bool:
    """Whether two workers can exchange pages."""
    return one.page_tokens == other.page_tokens and any(
        other.codecs.get(name) == params for name, params in one.codecs.items()
    )


def _mismatch(report: Report, required: Requirements) -> str | None:
    if report.role is None:
        return f"tells no role that {required.by} knows"
    if report.protocol_version != required.protocol_version:
        return f"speaks protocol {report.protocol_version}, {required.by} speaks {required.protocol_version}"
    if required.fingerprint is not None and report.fingerprint != required.fingerprint:
        theirs, ours = _short(report.fingerprint), _short(required.fingerprint)
        return f"runs model {report.model} ({theirs}), the gateway serves {required.model} ({ours})"
    return None


def _why_no_codec(report: Report, others: list[Report]) -> str:
    role = "decode" if report.role == "prefill" else "prefill"
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
