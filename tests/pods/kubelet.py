"""Runs the containers of pods as processes of this machine, as a kubelet and its container runtime do.

A pod has a network namespace (`network.py`) and, in its pause process, a host name and shared memory of its own; each
container has its mounts, its control group, and its processes, unless the pod shares those. Done here: init containers
one after the other, sidecars among them (restartPolicy Always); environment, volumes, user, read-only root; probes;
restarts; and the end of a pod: away from its Services, preStop, SIGTERM, and SIGKILL when its grace is over. Not done:
limits of CPU and memory, seccomp, images (the image is this machine's /usr, the Python that runs and this folder).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .network import Endpoint, Network
from .objects import Object, Objects, environment, expanded
from .probes import Probing
from .volumes import make_volumes, remove_volumes

REPOSITORY = Path(__file__).parents[2]
USER = 1000  # of the image
HOME = "/home/isthmus"
IMAGE = ["/usr", "/bin", "/sbin", "/lib", "/lib64", sys.base_prefix, str(REPOSITORY)]
PATH = f"{Path(sys.prefix, 'bin')}:/usr/local/bin:/usr/bin:/bin"
RESTART_S = 1.0  # a kubelet waits 10 s and longer
LOOK_S = 0.05


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
        self.volumes = make_volumes(pod, self.folder / "volumes", kubelet.objects, kubelet.claims, endpoint.address)
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
        assert pause.stdout and pause.stdout.readline(), "the pod's pause process did not start"
        return pause

    def _pause_main(self) -> int:
        return int(Path(f"/proc/{self.pause.pid}/task/{self.pause.pid}/children").read_text().split()[0])

    def _start(self) -> None:
        try:
            for container in self.init:
                container.start()
                if not container.is_sidecar:
                    self._complete(container)
            for container in self.containers:
                container.start()
        except Exception as error:
            self.error = error

    def _complete(self, container: "Container") -> None:
        while not container.ended.wait(LOOK_S):
            if self.stopping.is_set():
                raise PodFailed(f"{self.name} ends before it started")
        if container.exit_code:
            raise PodFailed(f"{self.name}: {container.name} ended with {container.exit_code}\n{container.log_end()}")

    def look(self) -> bool:
        """Whether all containers are ready; PodFailed where one can be no more."""
        if self.error:
            raise self.error
        running = [*self.sidecars, *self.containers]
        for container in running:
            if container.ended.is_set() and not self.stopping.is_set():
                raise PodFailed(f"{self.name}: {container.name} ended with {container.exit_code}\n{container.log_end()}")
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
            time.sleep(LOOK_S * 4)

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


class Container:
    """One container of a pod: its main process, started anew where the pod's restartPolicy says so."""

    def __init__(self, pod: Pod, container: Object) -> None:
        self.pod, self.container = pod, container
        self.name: str = container["name"]
        self.is_sidecar = container.get("restartPolicy") == "Always"
        self.log = pod.folder / f"{self.name}.log"
        self.cgroup = pod.kubelet.cgroup / f"{pod.name}.{self.name}"
        self.cgroup.mkdir()
        self.ended = threading.Event()  # for good
        self.exit_code: int | None = None
        self.restarts = 0
        self.main: int | None = None  # the process id
        self.probing: Probing | None = None
        self._thread: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        return self.main is not None and self.probing is not None and self.probing.ready

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def execute(self, command: list[str], timeout_s: float | None) -> subprocess.CompletedProcess[bytes]:
        """One command in the running container, as its user; TimeoutExpired after `timeout_s`."""
        namespaces = ["--mount", "--pid", "--net", "--uts", "--ipc", "--root", "--wd"]
        enter = ["nsenter", "--target", str(self.main), *namespaces, *self._privileges()]
        return subprocess.run([*enter, *command], env=self._environment(), capture_output=True, timeout=timeout_s)

    def signal(self, number: signal.Signals) -> None:
        """To the main process."""
        if self.main is not None:
            os.kill(self.main, number)

    def kill(self) -> None:
        """SIGKILL to everything in it."""
        (self.cgroup / "cgroup.kill").write_text("1")
        if self._thread:
            self._thread.join()

    def probe_failed(self, name: str) -> None:
        """A container that is not alive is killed; the pod's restartPolicy says what comes next."""
        self._note(f"{name} failed")
        (self.cgroup / "cgroup.kill").write_text("1")

    def end(self, deadline: float) -> None:
        """preStop, SIGTERM to the main process, and SIGKILL to everything from `deadline` on."""
        hook = (self.container.get("lifecycle") or {}).get("preStop")
        if self.main is not None and hook:
            self._run_hook(hook, deadline)
        try:
            self.signal(signal.SIGTERM)
        except ProcessLookupError:
            pass
        if self._thread:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def remove(self) -> None:
        self.cgroup.rmdir()

    def log_end(self, lines: int = 30) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"--- {self.pod.name} {self.name}\n" + "\n".join(text.splitlines()[-lines:])

    def _run_hook(self, hook: Object, deadline: float) -> None:
        if "sleep" in hook:
            time.sleep(min(hook["sleep"]["seconds"], max(0.0, deadline - time.monotonic())))
            return
        try:
            done = self.execute(hook["exec"]["command"], max(0.0, deadline - time.monotonic()))
            self._note(f"preStop ended with {done.returncode}: {(done.stdout + done.stderr).decode(errors='replace')}")
        except subprocess.TimeoutExpired:
            self._note("preStop did not end within the pod's grace")

    def _note(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(f"[kubelet] {text}\n")

    def _run(self) -> None:
        policy = "Always" if self.is_sidecar else self.pod.spec.get("restartPolicy", "Always")
        is_init = not self.is_sidecar and any(self is container for container in self.pod.init)
        while True:
            self.exit_code = self._run_once()
            again = not is_init and (policy == "Always" or (policy == "OnFailure" and self.exit_code != 0))
            if not again or self.pod.stopping.wait(RESTART_S):
                break
            self.restarts += 1
        self.ended.set()

    def _run_once(self) -> int:
        spec = self._spec()
        path = self.pod.folder / f"{self.name}.json"
        path.write_text(json.dumps(spec))
        own = [] if self.pod.spec.get("shareProcessNamespace") else ["--pid", "--kill-child"]
        command = [*self.pod.enter(), "unshare", "--mount", "--fork", *own, sys.executable, str(Path(__file__).with_name("container.py")), str(path)]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while process.poll() is None and not (found := self._processes()):
            time.sleep(LOOK_S)
        if process.poll() is None:
            self.main = found[0]
            self.probing = Probing(self)
        status = process.wait()
        if self.probing:
            self.probing.stop()
        self.main = self.probing = None
        (self.cgroup / "cgroup.kill").write_text("1")  # a container ends with its main process
        while self._processes():
            time.sleep(LOOK_S)
        return status

    def _processes(self) -> list[int]:
        return [int(line) for line in (self.cgroup / "cgroup.procs").read_text().split()]

    def _context(self) -> Object:
        return (self.pod.spec.get("securityContext") or {}) | (self.container.get("securityContext") or {})

    def _privileges(self) -> list[str]:
        """The command before the container's own that changes the user and gives up capabilities."""
        context = self._context()
        user, group = context.get("runAsUser", USER), context.get("runAsGroup", context.get("runAsUser", USER))
        assert user != 0 or not context.get("runAsNonRoot"), f"{self.name} must not run as root"
        groups = [*([context["fsGroup"]] if "fsGroup" in context else []), *context.get("supplementalGroups", ())]
        groups_option = ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
        dropped = (context.get("capabilities") or {}).get("drop") or ()
        return [
            *("/usr/bin/setpriv", "--reuid", str(user), "--regid", str(group), *groups_option),
            *(["--bounding-set=-all", "--inh-caps=-all"] if "ALL" in dropped else []),
            *([] if context.get("allowPrivilegeEscalation", True) else ["--no-new-privs"]),
        ]

    def _environment(self) -> dict[str, str]:
        kubelet, pod = self.pod.kubelet, self.pod
        image = {"PATH": PATH, "HOME": HOME, **kubelet.image_variables, "HOSTNAME": pod.name}
        return image | environment(self.container, pod.pod, kubelet.objects, pod.endpoint.address)

    def _spec(self) -> dict[str, Any]:
        """What `container.py` needs."""
        kubelet, values = self.pod.kubelet, self._environment()
        words = [*(self.container.get("command") or ()), *(self.container.get("args") or ())]
        root = self.pod.folder / f"{self.name}.root"
        root.mkdir(exist_ok=True)
        mounts = [(str(kubelet.network.hosts), "/etc/hosts", True)]
        for mount in self.container.get("volumeMounts") or ():
            source = self.pod.volumes[mount["name"]] / expanded(mount.get("subPath", ""), values)
            mounts.append((str(source), mount["mountPath"], bool(mount.get("readOnly"))))
        return {
            "root": str(root),
            "image": IMAGE,
            "etc": str(kubelet.etc),
            "home": [HOME, USER],
            "mounts": mounts,
            "read_only_root": bool(self._context().get("readOnlyRootFilesystem")),
            "cgroup": str(self.cgroup),
            "folder": self.container.get("workingDir", "/"),
            "privileges": self._privileges(),
            "command": [expanded(word, values) for word in words],
            "environment": values,
        }
