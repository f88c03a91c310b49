"""Jobs, events and answers as people see them in a terminal."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.text import Text

from ....proto.common_pb2 import FINISH_REASON_UNSPECIFIED, FinishReason, Priority
from ....proto.jobs_pb2 import Job, JobEvent, JobOutput, JobResult
from ...jobs.states import JobState
from ..terminal.columns import table_lines

COLOURS = {"succeeded": "green", "failed": "red", "expired": "red", "running": "cyan", "cancelled": "yellow"}


def as_dict(message: Message) -> dict[str, Any]:
    """A message for a program: field names as in the .proto file."""
    return MessageToDict(message, preserving_proto_field_name=True)


def state_name(state: int) -> str:
    """As a person writes it: "running"."""
    return JobState(state).name.lower()


def jobs_table(jobs: Iterable[Job]) -> list[Text]:
    """A line for each job."""
    rows = (
        (
            job.job_id,
            _coloured(job),
            f"{job.succeeded_count + job.failed_count}/{job.request_count}",
            str(job.output_tokens),
            _priority(job),
            _local(job.create_time).replace(" ", "T"),
            _took(job).replace(" ", ""),
            ",".join(f"{key}={value}" for key, value in sorted(job.labels.items())),
        )
        for job in jobs
    )
    titles = ("job", "state", "done", "tokens", "class", "submitted", "took", "labels")
    return table_lines(titles, rows, right=("done", "tokens", "took"))


def jobs_blocks(jobs: Iterable[Job]) -> list[Text]:
    """A heading and a line or more for each job, for a terminal that is narrower than the table."""
    lines = list[Text]()
    for job in jobs:
        done = f"{job.succeeded_count + job.failed_count}/{job.request_count} done, {job.output_tokens} tokens"
        took = f", took {_took(job)}" if _took(job) else ""
        lines.append(Text(f"{job.job_id}  ", style="bold").append_text(_coloured(job)))
        lines.append(Text(f"  {done}, {_priority(job)}, {_local(job.create_time)}{took}"))
        labels = (_whole(f"{key}={value}") for key, value in sorted(job.labels.items()))
        lines += [Text("  ").append_text(label) for label in labels]
    return lines


def job_table(job: Job) -> list[Text]:
    """A line for each thing that is known of one job."""
    failed = f", {job.failed_count} failed" if job.failed_count else ""
    rows: dict[str, str | Text] = {
        "job": job.job_id,
        "state": _coloured(job),
        "error": f"{job.error.code}: {job.error.message}" if job.error.code else "",
        "class": _priority(job),
        "tenant": job.tenant,
        "labels": " ".join(f"{key}={value}" for key, value in sorted(job.labels.items())),
        "requests": f"{job.succeeded_count} of {job.request_count} answered{failed}",
        "tokens": f"{job.prompt_tokens} prompt, {job.output_tokens} output",
        "submitted": _local(job.create_time),
        "started": _local(job.start_time) if job.HasField("start_time") else "",
        "ended": _local(job.end_time) if job.HasField("end_time") else "",
        "took": _took(job),
        "deadline": _local(job.deadline) if job.HasField("deadline") else "",
        "kept until": _local(job.expire_time) if job.HasField("expire_time") else "",
        "events": str(job.last_event),
        "resumed": f"{job.resumes} times" if job.resumes else "",
    }
    shown = {name: _whole(value) for name, value in rows.items() if value}
    width = max(map(len, shown))
    return [Text(f"{name:<{width}}  ", style="dim").append_text(value) for name, value in shown.items()]


def _whole(value: str | Text) -> Text:
    """In one line."""
    return value if isinstance(value, Text) else Text(" ".join(value.split()))


def result_lines(result: JobResult, *, alone: bool) -> list[str]:
    """One answer: the text alone, or under a heading where the job has several."""
    text = result.text if not result.error.code else f"{result.text}\n[{result.error.code}: {result.error.message}]"
    return [text] if alone else [_heading(result.request_index, _finish(result)), text, ""]


class TextView:
    """A job's events as text: streaming where it has one request; else each answer when it is complete."""

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone
        self._texts: dict[int, list[str]] = {}
        self._shown = False

    def show(self, event: JobEvent) -> str:
        """What to print for an event."""
        if not event.HasField("output"):
            return ""
        output = event.output
        if self._alone:
            self._shown = self._shown or bool(output.text)
            return output.text
        texts = self._texts.setdefault(output.request_index, [])
        texts.append(output.text)
        if output.finish_reason == FINISH_REASON_UNSPECIFIED and not output.error.code:
            return ""
        error = f"\n[{output.error.code}: {output.error.message}]" if output.error.code else ""
        text = "".join(self._texts.pop(output.request_index))
        return f"{_heading(output.request_index, _finish(output))}\n{text}{error}\n\n"

    def finish(self) -> str:
        """What to print at the end."""
        return "\n" if self._alone and self._shown else ""


def _heading(item: int, finish: str) -> str:
    return f"--- request {item} ({finish})"


def _finish(answer: JobResult | JobOutput) -> str:
    if answer.error.code:
        return "failed"
    if answer.finish_reason == FINISH_REASON_UNSPECIFIED:
        return "not finished"
    return f"{FinishReason.Name(answer.finish_reason).removeprefix('FINISH_REASON_').lower()}"


def _coloured(job: Job) -> Text:
    name = state_name(job.state)
    return Text(name, style=COLOURS.get(name, ""))


def _priority(job: Job) -> str:
    return Priority.Name(job.priority).removeprefix("PRIORITY_").lower()


def _local(time: Timestamp) -> str:
    return datetime.fromtimestamp(time.ToSeconds()).strftime("%Y-%m-%d %H:%M:%S")


def _took(job: Job) -> str:
    if not job.HasField("end_time"):
        return ""
    seconds = job.end_time.ToMilliseconds() / 1e3 - job.create_time.ToMilliseconds() / 1e3
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
