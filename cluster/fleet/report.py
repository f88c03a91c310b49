"""A worker's report as the gateway uses it: the fields of `WorkerReport` that decide where requests run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, Self

from ...proto.worker_pb2 import WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, WorkerReport, WorkerRole
from ..router.worker_columns import PrefillTime, StepTime

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, Role] = ("prefill", "decode")
ROLE_OF: dict[WorkerRole.ValueType, Role] = {WORKER_ROLE_PREFILL: "prefill", WORKER_ROLE_DECODE: "decode"}
NUMBER_OF: dict[Role, WorkerRole.ValueType] = {role: number for number, role in ROLE_OF.items()}


class Health(IntEnum):
    """As `WorkerHealth` on the wire (proto/worker.proto)."""

    UNSPECIFIED = 0
    READY = 1
    DRAINING = 2
    UNREACHABLE = 3
    INCOMPATIBLE = 4
    FAILED = 5
    CHECKING = 6
    UNFIT = 7
    STARTING = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The last report of one worker."""

    worker_id: str
    instance: str = ""  # drawn at each start and each flip; what is before the first "." is the process
    role: Role | None = None  # None: none that this gateway knows
    health: Health = Health.UNSPECIFIED
    own_address: str = ""  # where the worker listens, as far as it knows
    advertise: str = ""  # where others shall dial it, if that was configured
    protocol_version: int = 0
    model: str = ""
    fingerprint: str = ""  # of the model
    codecs: Mapping[str, str] = field(default_factory=dict)  # name -> parameter hash
    default_codec: str = ""
    page_tokens: int = 0
    pages_total: int = 0
    pages_free: int = 0  # free or only cached
    waiting_tokens: int = 0
    waiting_requests: int = 0
    running_requests: int = 0
    prefill: PrefillTime | None = None  # None: not measured
    step: StepTime | None = None
    links: Mapping[str, float] = field(default_factory=dict)  # decode: bytes per ms from prefill workers' addresses

    @classmethod
    def from_pb(cls, report: WorkerReport) -> Self:
        """Of a message; values of enums that a newer worker knows become None and UNSPECIFIED."""
        rate, step = report.prefill_rate, report.step_rate
        return cls(
            worker_id=report.worker_id,
            instance=report.instance,
            role=ROLE_OF.get(report.role),
            health=Health(report.health) if report.health in _HEALTHS else Health.UNSPECIFIED,
            own_address=report.address,
            advertise=report.advertise,
            protocol_version=report.protocol_version,
            model=report.model.name,
            fingerprint=report.model.fingerprint,
            codecs=dict(report.codecs),
            default_codec=report.default_codec,
            page_tokens=report.page_tokens,
            pages_total=report.pages.total,
            pages_free=report.pages.free + report.pages.cached,
            waiting_tokens=report.waiting_tokens,
            waiting_requests=report.waiting_requests,
            running_requests=report.running_requests,
            prefill=PrefillTime(rate.ms, rate.ms_per_token, rate.ms_per_token_ktoken)
            if report.HasField("prefill_rate")
            else None,
            step=StepTime(step.ms, step.ms_per_sequence, step.ms_per_page) if report.HasField("step_rate") else None,
            links=dict(report.link_bytes_per_ms),
        )

    @property
    def process(self) -> str:
        """The process that runs the worker: the same before and after a flip."""
        return self.instance.partition(".")[0]

    @property
    def pairing(self) -> tuple[object, ...]:
        """What decides whether and with whom the worker may be used."""
        return (
            *(self.health, self.role, self.instance, self.protocol_version, self.fingerprint),
            *(self.page_tokens, self.default_codec, self.codecs),
        )


_HEALTHS = frozenset(Health)
