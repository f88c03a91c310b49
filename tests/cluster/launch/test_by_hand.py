"""Workers and a gateway that are started by hand, each with the one settings file."""

from pathlib import Path

from clusters import wait_ready
from models import model_path
from support.dialling import blocking_channel
from support.processes import free_port, isthmus

from isthmus.cluster.launch.worker_thread import usable_cores
from isthmus.proto.worker_pb2 import GetStatusRequest
from isthmus.proto.worker_pb2_grpc import ClusterStub


def test_one_file_starts_all_and_two_workers_share_the_cores(tmp_path: Path) -> None:
    prefill, decode, port, admin = (free_port() for _ in range(4))
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"model: {model_path('tiny-llama')}\n"
        "dtype: float32\n"
        f"port: {port}\n"
        f"gateway: {{workers: ['127.0.0.1:{prefill}', '127.0.0.1:{decode}'], admin_listen: '127.0.0.1:{admin}'}}\n"
        f"prefill_worker: {{listen: '127.0.0.1:{prefill}', name: first, pool_gib: 0.25}}\n"
        f"decode_worker: {{listen: '127.0.0.1:{decode}', name: second, pool_gib: 0.25}}\n"
    )
    config = ("--config", str(file))
    with (
        isthmus("worker", "prefill", *config),
        isthmus("worker", "decode", *config),
        isthmus("gateway", *config),
        blocking_channel(f"127.0.0.1:{admin}") as channel,
    ):
        wait_ready(f"127.0.0.1:{admin}", 2)
        workers = ClusterStub(channel).GetStatus(GetStatusRequest(), timeout=5).workers
    assert sorted(worker.worker_id for worker in workers) == ["first", "second"]
    assert [worker.threads for worker in workers] == [max(1, usable_cores() // 2)] * 2
