"""One container of a pod: its main process, started anew where the pod's restartPolicy says so."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .objects import Object, environment, expanded
from .probes import Probing

if TYPE_CHECKING:
    from .kubelet import Pod

REPOSITORY = Path(__file__).parents[3]
LAUNCH = Path(__file__).with_name("launch.py")
USER = 1000  # of the image
HOME = "/home/isthmus"
IMAGE = ["/usr", "/bin", "/sbin", "/lib", "/lib64", sys.base_prefix, str(REPOSITORY)]
PATH = f"{Path(sys.prefix, 'bin')}:/usr/local/bin:/usr/bin:/bin"
RESTART_S = 1.0  # a kubelet waits 10 s and longer
LOOK_S = 0.05


class Container:
    """`container` is its part of the pod's spec."""

    def __init__(self, pod: "Pod", container: Object) -> None:
        self.pod, self.container = pod, container
        self.name: str = container["name"]
        self.is_sidecar = container.get("restartPolicy") == "Always"
        self.log = pod.folder / f"{self.name}.log"
        self.cgroup = pod.kubelet.cgroup / f"{pod.name}.{self.name}"
        self.cgroup.mkdir()
        self.started = threading.Event()  # once its startupProbe has passed
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
        return subprocess.run(self._inside(command), env=self._environment(), capture_output=True, timeout=timeout_s)

    def spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        """The same, left running: its output can be read while it comes."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self._inside(command), env=self._environment(), stdout=pipe, stderr=pipe)

    def _inside(self, command: list[str]) -> list[str]:
        namespaces = ["--mount", "--pid", "--net", "--uts", "--ipc", "--root", "--wd"]
        return ["nsenter", "--target", str(self.main), *namespaces, *self._privileges(), *command]

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
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGTERM)
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
        launch = [sys.executable, str(LAUNCH), str(path)]
        command = [*self.pod.enter(), "unshare", "--mount", "--fork", *own, *launch]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        found: list[int] = []
        while process.poll() is None and not found:
            time.sleep(LOOK_S)
            found = self._processes()
        if found:
            self.main = min(found)  # the others come of it
            self.probing = Probing(self)
        status = process.wait()
        if self.probing:
            self.probing.stop()
        self.main = self.probing = None
        self.started.clear()
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
