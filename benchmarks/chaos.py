"""Faults under load on real processes, and corrupted frames; writes what came of the answers as JSON.

Each part answers the same requests twice, undisturbed and under faults, and compares the tokens. A third, undisturbed
run with another number of requests at once is the control: what differs there differs by who shares a batch (the last
bits of a sum), not by faults.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.cluster import ChaosCluster, chaos_cluster
from faults.frames import frame_rig, mutate_frames
from faults.kills import Faults, compare_runs, hurt_gateway, hurt_links, hurt_workers
from faults.load import answer_all, cancel_storm, make_requests
from faults.poison import hang, poison
from support.dialling import to_gateway
from support.report import Report, conditions, say

from isthmus.model.load.describe import describe_model
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.worker_pb2 import FlipWorkerRequest, WorkerRole
from isthmus.proto.worker_pb2_grpc import ClusterStub

PARTS = ("flip", "kill", "stop", "gateway", "cut", "delayed", "throttled", "storm", "poison", "hang", "frames")
LINKS = ("cut", "delayed", "throttled")
BASELINE_S = 5.0
GATEWAY_TIMES = 4  # more seconds between two kills of the gateway: an answer begins anew with it, and takes seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--parts", default=",".join(PARTS), help="of: " + ", ".join(PARTS))
    parser.add_argument(
        "--requests",
        type=int,
        default=200,
        help="of the part `kill`; half in `poison`, a tenth in `hang`, else a quarter",
    )
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="of the longest answer; the shortest has half")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the longest prompt")
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds between two faults, about; four times as many for the gateway"
    )
    parser.add_argument("--codecs", default="raw,tq-k4v4")
    parser.add_argument("--frames", type=int, default=10_000, help="corrupted frames")
    parser.add_argument("--cancels", type=int, default=500, help="within 10 s")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def requests_of(options: argparse.Namespace, count: int) -> list[GenerateRequest]:
    return make_requests(
        count,
        vocab=describe_model(options.model).vocab_size,
        prompt=(20, options.prompt),
        tokens=(options.tokens // 2, options.tokens),
        codecs=options.codecs.split(","),
        seed=options.seed,
    )


async def run_part(cluster: ChaosCluster, part: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One part on a running cluster."""
    if part == "flip":
        return await flips(cluster)
    if part == "poison":
        return await poison(cluster, requests_of(options, options.requests // 2), folder, at_once=options.at_once)
    if part == "hang":
        hung = requests_of(options, max(8, options.requests // 10))
        return await hang(cluster, hung, folder, at_once=options.at_once)
    faults, common = Faults(), {"every_s": options.every, "seed": options.seed}
    requests = requests_of(options, options.requests if part == "kill" else max(8, options.requests // 4))
    if part == "storm":
        cancelled = await cancel_storm(
            cluster.gateway.address, requests, count=options.cancels, within_s=10.0, seed=options.seed
        )
        return {"cancels": options.cancels, "while_running": cancelled, "leaked_pages": await leaked(cluster)}
    hurting = {
        "kill": lambda: hurt_workers(cluster, faults, **common),
        "stop": lambda: hurt_workers(cluster, faults, how="stop", **common),
        "gateway": lambda: hurt_gateway(cluster, faults, **common | {"every_s": GATEWAY_TIMES * options.every}),
        **{name: lambda name=name: hurt_links(cluster, faults, name, **common) for name in LINKS},
    }[part]()
    result = await compare_runs(cluster, requests, hurting, faults, at_once=options.at_once)
    if part == "kill":
        few = requests[: max(8, len(requests) // 4)]
        result["control"] = {"requests": len(few), "differ": await control(cluster, few, options.at_once)}
    return result


async def control(cluster: ChaosCluster, requests: Sequence[GenerateRequest], at_once: int) -> int:
    """How many answers differ between two undisturbed runs that share batches differently."""
    many = await answer_all(cluster.gateway.address, requests, at_once=at_once)
    few = await answer_all(cluster.gateway.address, requests, at_once=max(1, at_once // 2))
    return sum(one.token_ids != other.token_ids for one, other in zip(many, few, strict=True))


async def flips(cluster: ChaosCluster) -> dict[str, Any]:
    """Seconds that an idle worker takes to the other role and back: from the order until it has passed its canary."""
    taken = []
    async with to_gateway(cluster.admin) as channel:
        for role in (WorkerRole.WORKER_ROLE_PREFILL, WorkerRole.WORKER_ROLE_DECODE) * 3:
            begun_s = time.monotonic()
            await ClusterStub(channel).FlipWorker(FlipWorkerRequest(worker="decode-1", role=role, timeout_s=10))
            taken.append(round(time.monotonic() - begun_s, 2))
    return {"flip_s": max(taken), "flips_s": taken, "leaked_pages": await leaked(cluster)}


async def leaked(cluster: ChaosCluster) -> int:
    return await cluster.leaked_pages(within_s=BASELINE_S)


def main() -> None:
    options = arguments()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"no part {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    with Report(options.json) as report:
        report.put(conditions=conditions(**vars_of(options)))
        asyncio.run(run(report, parts, options))


async def run(report: Report, parts: Sequence[str], options: argparse.Namespace) -> None:
    """All parts in turn; `frames`, which needs no cluster, at the end."""
    results: dict[str, Any] = {}

    def done(part: str, result: dict[str, Any]) -> None:
        results[part] = result
        say(f"{part}: {json.dumps(result)}")
        report.put(**totals(results), parts=results)

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        if set(parts) - {"frames"}:
            say("starting a cluster")
            async with chaos_cluster(options.model, Path(folder), links=True, faults=Path(folder)) as cluster:
                for part in parts:
                    if part != "frames":
                        say(f"{part}: begins")
                        done(part, await run_part(cluster, part, options, Path(folder)))
    if "frames" in parts:
        async with frame_rig(str(describe_model(options.model).path), options.seed) as rig:
            done("frames", await mutate_frames(rig, options.frames, options.seed))


def totals(results: dict[str, Any]) -> dict[str, Any]:
    """The figures of all parts together; the pause is that of the part `kill`."""

    def total(name: str) -> int:
        return sum(result.get(name, 0) for part, result in results.items() if part != "frames")

    frames = results.get("frames", {})
    return {
        "requests": total("requests"),
        "answered": total("answered"),
        "identical": total("identical"),
        "leaked_pages": total("leaked_pages"),
        "flip_s": results.get("flip", {}).get("flip_s"),
        "pause_p99_s": results.get("kill", {}).get("pause_p99_s"),
        "refused_frames": frames.get("refused_frames"),
        "wrong_tokens": frames.get("wrong_tokens"),
        **{part: results[part] for part in ("poison", "hang") if part in results},
    }


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "json"}


if __name__ == "__main__":
    main()
