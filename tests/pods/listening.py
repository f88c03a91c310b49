"""Who listens where in a pod, and who gets through to it."""

import json
import subprocess
import sys

from .node.kubelet import Pod

_TRY = """
import json, socket, sys
answers = {}
for target in json.loads(sys.argv[1]):
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
        answers[target] = ""
    except OSError as error:
        answers[target] = error.strerror or str(error)
print(json.dumps(answers))
"""


def open_ports(pod: Pod) -> set[int]:
    """TCP ports that its processes listen on, at another address than loopback."""
    done = subprocess.run(["ip", "netns", "exec", pod.name, "ss", "-ltnH"], capture_output=True, text=True, check=True)
    local = (line.split()[3].rpartition(":") for line in done.stdout.splitlines())
    return {int(port) for host, _, port in local if not host.strip("[]").startswith(("127.", "::1", "::ffff:127."))}


def connections(pod: Pod, targets: list[str]) -> dict[str, str]:
    """For each host:port why a connection from within the pod failed; "" where it did not."""
    container = pod.containers[0]
    done = container.execute([sys.executable, "-S", "-c", _TRY, json.dumps(targets)], timeout_s=60)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)
