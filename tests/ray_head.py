"""A Ray of its own for tests, as a program: prints its address, and ends with its input.

    python tests/ray_head.py '{"prefill": 2, "decode": 2}'

`start_ray` runs it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes


@contextmanager
def start_ray(resources: Mapping[str, float]) -> Iterator[str]:
    """A Ray with these custom resources; yields the host:port of its head."""
    program = [sys.executable, __file__, json.dumps(dict(resources))]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().decode().strip()
        assert address, "Ray did not start"
        yield address
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def main(resources: Mapping[str, float]) -> None:
    from isthmus.cluster.launch.ray_cluster import QUIET, _no_helpers

    os.environ.update(QUIET)
    import ray

    with _no_helpers():
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=2,
            num_gpus=0,
            resources=dict(resources),
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
        )
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
