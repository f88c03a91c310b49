"""Runs the containers of pods as processes of this machine, as a kubelet and its container runtime do.

A pod has a network namespace (`network.py`) and, in its pause process, a host name and shared memory of its own; each
container has its mounts, its control group, and its processes, unless the pod shares those. Done here: init containers
one after the other, sidecars among them (restartPolicy Always); environment, volumes, user, read-only root; probes;
restarts; and the end of a pod: away from its Services, preStop, SIGTERM, and SIGKILL when its grace is over. Not done:
limits of CPU and memory, seccomp, images (the image is this machine's /usr, the Python that runs and this folder).
"""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .container import HOME, USER, Container
from .network import Endpoint, Network
from .objects import Object, Objects
from .volumes import make_volumes, remove_volumes

LOOK_S = 0.2
RESTARTS = 5  # of a container that nothing more is expected of


class PodFailed(Exception):
    """A container of the pod ended that should not have; has the end of its log."""


@dataclass
class Kubelet:
    """`folder` is where pods have their volumes, logs and roots; `claims` the folders of PersistentVolumeClaims."""

    folder: Path
    network: Network
    objects: Objects
    claims: Mapping[str, Path] = field(default_factory=dict)
    image_variables: Mapping[str, str] = field(default_factory=dict)  # what the image's ENV says beside PATH and HOME

    def __post_init__(self) -> None:
        self.etc = self.folder / "etc"
        self.etc.mkdir(parents=True)
        for name in ("ld.so.cache", "nsswitch.conf", "alternatives", "ssl", "localtime", "services", "protocols"):
            if (source := Path("/etc", name)).is_dir():
                shutil.copytree(source, self.etc / name, symlinks=True)
            elif source.exists():
                shutil.copy(source, self.etc / name)
        users = ("root:x:0:0::/root:/bin/bash", f"isthmus:x:{USER}:{USER}::{HOME}:/bin/bash")
        (self.etc / "passwd").write_text("\n".join(users) + "\n")
        (self.etc / "group").write_text(f"root:x:0:\nisthmus:x:{USER}:\n")
        for name in ("hosts", "resolv.conf"):  # names are in the first; nobody is asked for others
            (self.etc / name).touch()
        self.cgroups = self.folder / "cgroups"
        self.cgroups.mkdir()
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", self.cgroups], check=True)
        self.cgroup = self.cgroups / f"isthmus-pods-{os.stat(self.folder).st_ino}"
        self.cgroup.mkdir()

    def close(self) -> None:
        self.cgroup.rmdir()
        subprocess.run(["umount", self.cgroups], check=True)

    def run(self, pod: Object) -> "Pod":
        """A pod whose containers start; `wait_ready` waits for them."""
        return Pod(self, pod, self.network.attach(pod))


class Pod:
    """One pod from its start to its end."""

    def __init__(self, kubelet: Kubelet, pod: Object, endpoint: Endpoint) -> None:
        self.kubelet, self.pod, self.endpoint = kubelet, pod, endpoint
        self.name: str = pod["metadata"]["name"]
        self.spec: Object = pod["spec"]
        self.folder = kubelet.folder / self.name
        self.folder.mkdir()
        self.stopping = threading.Event()
        self.error: Exception | None = None
        self.volumes = make_volumes(pod, self.folder / "volumes", kubelet.objects, kubelet.claims)
        self.pause = self._start_pause()
        self.containers = [Container(self, container) for container in self.spec["containers"]]
        self.init = [Container(self, container) for container in self.spec.get("initContainers") or ()]
        self._thread = threading.Thread(target=self._start, daemon=True)
        self._thread.start()

    @property
    def sidecars(self) -> list["Container"]:
        return [container for container in self.init if container.is_sidecar]

    def container(self, name: str) -> "Container":
        return next(container for container in [*self.init, *self.containers] if container.name == name)

    def enter(self) -> list[str]:
        """The command that runs another one in what the containers of the pod share."""
        of_pause = f"/proc/{self.pause.pid}/ns"
        shared = ["--pid=" + f"/proc/{self._pause_main()}/ns/pid"] if self.spec.get("shareProcessNamespace") else []
        return ["nsenter", f"--net=/run/netns/{self.name}", f"--uts={of_pause}/uts", f"--ipc={of_pause}/ipc", *shared]

    def _start_pause(self) -> subprocess.Popen[bytes]:
        command = ["unshare", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        # The first process of a process namespace takes in orphans: a shell that waits lets them end.
        script = 'hostname "$1"; sleep infinity & echo; wait'
        pause = subprocess.Popen([*command, "bash", "-c", script, "pause", self.name], stdout=subprocess.PIPE)
        assert pause.stdout is not None
        with pause.stdout:
            assert pause.stdout.readline(), "the pod's pause process did not start"
        return pause

    def _pause_main(self) -> int:
        return int(Path(f"/proc/{self.pause.pid}/task/{self.pause.pid}/children").read_text().split()[0])

    def _start(self) -> None:
        try:
            for container in self.init:
                container.start()
                self._wait(container.started if container.is_sidecar else container.ended)
                if not container.is_sidecar and container.exit_code:
                    raise PodFailed(f"{container.log_end()}\n{container.name} ended with {container.exit_code}")
            for container in self.containers:
                container.start()
        except Exception as error:
            self.error = error

    def _wait(self, event: threading.Event) -> None:
        while not event.wait(LOOK_S):
            if self.stopping.is_set():
                raise PodFailed(f"{self.name} ends before it started")

    def look(self) -> bool:
        """Whether all containers are ready; PodFailed where one can be no more."""
        if self.error:
            raise self.error
        running = [*self.sidecars, *self.containers]
        for container in running:
            lost = container.ended.is_set() or container.restarts >= RESTARTS
            if lost and not self.stopping.is_set():
                raise PodFailed(
                    f"{self.name}: {container.name} ended with {container.exit_code}\n{container.log_end()}"
                )
        ready = not self.stopping.is_set() and all(container.ready for container in running)
        self.kubelet.network.set_ready(self.name, ready)
        return ready

    def wait_ready(self, within_s: float) -> None:
        """TimeoutError, with the end of all logs, after `within_s`."""
        end = time.monotonic() + within_s
        while not self.look():
            if time.monotonic() > end:
                logs = "\n".join(container.log_end() for container in [*self.init, *self.containers])
                raise TimeoutError(f"{self.name} is not ready after {within_s} s\n{logs}")
            time.sleep(LOOK_S)

    def end(self, grace_s: float | None = None) -> float:
        """As `kubectl delete pod`: returns the seconds that it took. Sidecars end after the other containers."""
        began = time.monotonic()
        self.stopping.set()
        self.kubelet.network.set_ready(self.name, False)
        deadline = began + (self.spec.get("terminationGracePeriodSeconds", 30) if grace_s is None else grace_s)
        ending = [threading.Thread(target=container.end, args=(deadline,)) for container in self.containers]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()
        for container in reversed(self.init):
            container.end(deadline)
        took = time.monotonic() - began
        self._remove()
        return took

    def kill(self) -> None:
        """As if the machine were gone."""
        self.stopping.set()
        self.kubelet.network.set_ready(self.name, False)
        for container in [*self.containers, *self.init]:
            container.kill()
        self._remove()

    def _remove(self) -> None:
        self._thread.join()
        for container in [*self.containers, *self.init]:
            container.remove()
        self.pause.kill()
        self.pause.wait()
        self.kubelet.network.detach(self.name)
        remove_volumes(self.folder / "volumes")
