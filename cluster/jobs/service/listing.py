"""What may be asked of the jobs that are there: questions of the wire, checked; nothing else reaches the database."""

from google.protobuf.timestamp_pb2 import Timestamp

from ....proto.errors import InvalidRequest
from ....proto.jobs_pb2 import ListJobsRequest
from ....proto.names import check_name
from ..labels import check_labels
from ..states import JobState
from ..store.queries import Listing

DEFAULT_PAGE, MAX_PAGE = 100, 1000
MAX_STATES = 100  # entries; equal ones count once
MAX_JOB_ID = MAX_PAGE_TOKEN = 256
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799  # years 1 and 9999: what a Timestamp may say


def listing(request: ListJobsRequest) -> Listing:
    """A question for jobs; InvalidRequest that names the field that is wrong."""
    if len(request.states) > MAX_STATES:
        raise InvalidRequest(f"states has {len(request.states)} entries; allowed: at most {MAX_STATES}")
    after, before = (
        time_us(name, getattr(request, name)) if request.HasField(name) else None
        for name in ("created_after", "created_before")
    )
    return Listing(
        tenant=check_name("tenant", request.tenant),
        states=sorted({_state(state) for state in request.states}),
        labels=check_labels(request.labels),
        created_after_us=after,
        created_before_us=before,
        limit=page_size(request.page_size),
        page_token=page_token(request.page_token),
    )


def job_id(asked: str) -> str:
    """The id of a job, as far as one can tell without looking; InvalidRequest for what is none."""
    return check_name("job_id", asked, MAX_JOB_ID)


def page_token(asked: str) -> str:
    """InvalidRequest for what is too long to be one; the query looks into it."""
    if len(asked) > MAX_PAGE_TOKEN:
        raise InvalidRequest(f"page_token of {len(asked)} characters; allowed: next_page_token of the page before")
    return asked


def page_size(asked: int) -> int:
    """How many entries a page shall have."""
    if asked > MAX_PAGE:
        raise InvalidRequest(f"page_size is {asked}; allowed: at most {MAX_PAGE}")
    return asked or DEFAULT_PAGE


def time_us(what: str, time: Timestamp) -> int:
    """Microseconds since 1970; InvalidRequest for a message that is no time."""
    if not (_FIRST_S <= time.seconds <= _LAST_S and 0 <= time.nanos < 1_000_000_000):
        raise InvalidRequest(
            f"{what} of {time.seconds} s and {time.nanos} ns is no time; allowed: the years 1 to 9999, and 0 to "
            "999999999 ns"
        )
    return time.seconds * 1_000_000 + time.nanos // 1000


def _state(value: int) -> int:
    try:
        return JobState(value).value
    except ValueError:
        allowed = ", ".join(state.name for state in JobState)
        raise InvalidRequest(f"no state {value}; allowed: {allowed}") from None
