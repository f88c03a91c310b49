"""`isthmus status` and `isthmus models`."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from .terminal import options as opt

if TYPE_CHECKING:
    from rich.text import Text

    from ...proto.worker_pb2 import ClusterStatus, WorkerReport

NOT_READY = 1
ANSWER_S = 10.0


def status(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Model, codec, memory, versions too.")] = False,
    as_json: opt.Json = False,
    admin: opt.Admin = opt.DEFAULT_ADMIN,
) -> None:
    """Show the workers, a line for each: role, health, requests that run and wait, pages in use, address.

    Below them why some may not be used. Exits with 1, and says why, unless a worker of each role is ready and the
    gateway is healthy; a pool of prefill workers that was scaled to 0 is none where decode workers compute prompts.

    [bold]Examples[/]

      isthmus status

      isthmus status -v

      isthmus status --json --admin 127.0.0.1:50053
    """
    from google.protobuf.json_format import MessageToDict

    cluster = asyncio.run(_status(admin))
    if as_json:
        print(json.dumps(MessageToDict(cluster, preserving_proto_field_name=True)))
    else:
        from .terminal.columns import print_lines

        print_lines(_status_lines(cluster, verbose=verbose))
    if any(role.missing for role in _roles(cluster)) or cluster.failing:
        raise typer.Exit(NOT_READY)


async def _status(admin: str) -> "ClusterStatus":
    from ...proto.worker_pb2 import GetStatusRequest

    async with opt.admin_of(admin) as cluster:
        return await cluster.GetStatus(GetStatusRequest(), timeout=ANSWER_S)


class _Role(NamedTuple):
    """A role of which no worker is ready."""

    missing: bool  # requests are not served as they should be
    text: str


def _roles(cluster: "ClusterStatus") -> "Iterator[_Role]":
    """Each role of which no worker is ready, and why."""
    from ...proto.worker_pb2 import WORKER_HEALTH_READY, WorkerRole

    ready = {worker.role for worker in cluster.workers if worker.health == WORKER_HEALTH_READY}
    decode = WorkerRole.Value("WORKER_ROLE_DECODE")
    for role in ("decode", "prefill"):
        number = WorkerRole.Value(f"WORKER_ROLE_{role.upper()}")
        if number in ready:
            continue
        if role not in cluster.wanted or cluster.wanted[role]:
            there = any(worker.role == number for worker in cluster.workers)
            yield _Role(True, f"no {role} worker is ready" if there else f"there is no {role} worker")
            continue
        order = f"none is wanted (scaled to 0, or drained with its host); isthmus scale {role}=1 starts one"
        if role == "prefill" and cluster.local_prefill and decode in ready:
            yield _Role(False, f"no prefill worker, decode workers compute the prompts: {order}")
        else:
            yield _Role(True, f"no {role} worker: {order}")


def _role_lines(cluster: "ClusterStatus") -> "Iterator[Text]":
    from rich.text import Text

    for role in _roles(cluster):
        title = "cannot serve: " if role.missing else "by order: "
        yield Text(title, style="red" if role.missing else "yellow").append(role.text, style="default")


def _task_lines(cluster: "ClusterStatus") -> "Iterator[Text]":
    """Background tasks of the gateway that raised what they should not."""
    from rich.text import Text

    for name in cluster.failing:
        why = f"{name} fails again and again; see the gateway's log"
        yield Text("gateway: ", style="red").append(why, style="default")
    if cluster.task_failures:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(cluster.task_failures.items()))
        yield Text("exceptions of background tasks: ", style="yellow").append(counts, style="default")


def _access(cluster: "ClusterStatus") -> str:
    """Who may ask, in a few words."""
    access = cluster.access
    return access.mode.replace("keys", f"keys ({access.keys} valid)")


def _access_lines(cluster: "ClusterStatus") -> "Iterator[Text | str]":
    """What people should know of who may ask, who was refused, and what is logged of it."""
    from rich.text import Text

    access = cluster.access
    if access.mode == "anonymous":
        yield Text("everybody may ask who reaches the gateway (anonymous)", style="yellow")
    for problem in access.problems:
        yield Text("nobody is let in: ", style="red").append(problem, style="default")
    if access.refused:
        yield "refused: " + ", ".join(f"{reason} {count}" for reason, count in sorted(access.refused.items()))
    if cluster.log_content:
        yield Text("prompts and outputs are logged (log_content)", style="yellow")


def _tls_lines(cluster: "ClusterStatus") -> "Iterator[Text]":
    """Plain text, and certificates that end soon, or have ended."""
    from rich.text import Text

    from ...proto.rpc.addresses import parse_address
    from ...proto.security.certificates import WARN_DAYS

    if cluster.http.startswith("http:") and not parse_address(cluster.http.partition("//")[2]).is_loopback:
        yield Text("plain text: ", style="yellow").append(f"{cluster.http} (gateway.http.tls: off)", style="default")
    plain = [worker.worker_id for worker in cluster.workers if worker.version and not worker.tls]
    if cluster.tls and plain:
        yield Text("plain text: ", style="yellow").append(f"{', '.join(plain)} (tls: off)", style="default")
    holders = [("the gateway", cluster), *((worker.worker_id, worker) for worker in cluster.workers)]
    for name, holder in holders:
        days = (holder.certificate_expires_unix_s - time.time()) / 86_400
        if holder.certificate_expires_unix_s and days < WARN_DAYS:
            when = "has ended" if days < 0 else f"ends in {days:.1f} days"
            yield Text("certificate: ", style="red" if days < 0 else "yellow").append(
                f"that of {name} {when}", style="default"
            )


def _tls_part(cluster: "ClusterStatus") -> str:
    """Whether it is encrypted, and until when its first certificate lasts."""
    if not cluster.tls:
        return "plain text"
    ends = [each.certificate_expires_unix_s for each in (cluster, *cluster.workers) if each.certificate_expires_unix_s]
    until = f", certificates until {time.strftime('%Y-%m-%d', time.gmtime(min(ends)))}" if ends else ""
    return f"TLS{until}"


def _http_part(cluster: "ClusterStatus") -> str:
    """Where HTTP is answered, and whether it can be read on the way."""
    return f"{cluster.http} ({'TLS' if cluster.http.startswith('https:') else 'plain text'})"


def _status_lines(cluster: "ClusterStatus", *, verbose: bool) -> "Iterator[Text | str]":
    """A line for each worker, what matters first; with `verbose` more lines below each."""
    from rich.text import Text

    from .memory import memory_lines
    from .terminal.columns import table_lines

    heading, *lines = table_lines(
        ("worker", "role", "health", "run", "wait", "pages", "address"),
        map(_row, cluster.workers),
        right=("run", "wait", "pages"),
    )
    yield heading
    for worker, line in zip(cluster.workers, lines, strict=True):
        yield line
        if verbose:
            yield from (f"  {name}: {value}" for name, value in _details(worker).items() if value)
    if verbose:
        yield from memory_lines(cluster)
    for worker in cluster.workers:
        if worker.reason:
            yield Text(f"{worker.worker_id}: ", style="red").append(worker.reason, style="default")
    yield from _role_lines(cluster)
    yield from _task_lines(cluster)
    yield from _tls_lines(cluster)
    yield from _access_lines(cluster)
    parts = [
        f"isthmus {cluster.version}",
        *([f"cluster {cluster.cluster_id}"] if cluster.cluster_id else []),
        *([f"supervisor {cluster.supervisor}"] if cluster.supervisor else []),
        *([f"{cluster.gateways} gateways"] if cluster.gateways else []),
        f"{cluster.active_requests} active requests",
        f"up {cluster.uptime_ms / 1e3:.0f} s",
        *([f"access: {_access(cluster)}"] if cluster.access.mode else []),
        _tls_part(cluster),
        *([_http_part(cluster)] if cluster.http else []),
    ]
    yield " · ".join(parts)


def _row(worker: "WorkerReport") -> "list[str | Text]":
    from rich.text import Text

    from ...proto.worker_pb2 import (
        WORKER_HEALTH_CHECKING,
        WORKER_HEALTH_DRAINING,
        WORKER_HEALTH_READY,
        WORKER_HEALTH_STARTING,
        WorkerHealth,
        WorkerRole,
    )

    health = WorkerHealth.Name(worker.health).removeprefix("WORKER_HEALTH_").lower()
    passing = {WORKER_HEALTH_DRAINING: "yellow", WORKER_HEALTH_CHECKING: "yellow", WORKER_HEALTH_STARTING: "yellow"}
    colour = {WORKER_HEALTH_READY: "green", **passing}.get(worker.health, "red")
    role = WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower() if worker.role else "?"
    pages = worker.pages
    return [
        worker.worker_id,
        role,
        Text(health, style=colour),
        str(worker.running_requests),
        str(worker.waiting_requests),
        f"{100 * pages.in_use / pages.total:.0f}%" if pages.total else "",
        worker.address,
    ]


def _certificate(worker: "WorkerReport") -> str:
    if not worker.tls or not worker.certificate_expires_unix_s:
        return ""
    return f"until {time.strftime('%Y-%m-%d', time.gmtime(worker.certificate_expires_unix_s))}"


def _details(worker: "WorkerReport") -> dict[str, str]:
    """What `-v` shows of a worker, by name; nothing for what is not known of it."""
    if not worker.version:
        return {}
    pages, model = worker.pages, worker.model
    return {
        "model": f"{model.name}, {worker.dtype} on {worker.device}, {worker.threads} threads",
        "codec": f"{worker.default_codec}, pages of {worker.page_tokens} tokens",
        "pages": f"{pages.in_use} in use, {pages.cached} cached, {pages.free} free of {pages.total}",
        "waiting": f"{worker.waiting_tokens} tokens" if worker.waiting_tokens else "",
        "advertised": worker.advertise if worker.advertise != worker.address else "",
        "could not flip": worker.flip_failure,
        "certificate": _certificate(worker),
        "version": f"{worker.version}, protocol {worker.protocol_version}, up {worker.uptime_ms / 1e3:.0f} s",
    }
