"""What the Dockerfile says of itself, read as text. `make image-check` builds it and looks inside (tests/image)."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """(name, arguments) of each, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, list[Instruction]]:
    """Instructions of each stage, of the last one under ""; what is before the first under "before"."""
    found: dict[str, list[Instruction]] = {"before": []}
    name = "before"
    for instruction, arguments in instructions():
        if instruction == "FROM":
            name = arguments.partition(" AS ")[2]
            found[name] = []
        found[name].append((instruction, arguments))
    return found


def test_the_base_is_an_argument_that_is_never_latest() -> None:
    (base,) = stages()["before"]
    assert base == ("ARG", "BASE=debian:bookworm-slim")
    sources = [arguments.split(" AS ")[0] for name, arguments in instructions() if name == "FROM"]
    assert sources[0] == "${BASE}"
    assert set(sources[1:]) <= set(stages())  # no image but that one
    assert "latest" not in (ROOT / "Dockerfile").read_text()


def test_the_last_stage_installs_nothing_and_ends_as_a_user_by_number() -> None:
    last = stages()[""]
    assert last[0] == ("FROM", "system")  # not the one with the compiler
    assert [arguments for name, arguments in last if name in ("RUN", "ADD")] == []
    assert {arguments.split()[0] for name, arguments in last if name == "COPY"} <= {
        f"--from={stage}" for stage in ("dependencies", "weights", "project")
    }
    assert [arguments for name, arguments in last if name == "USER"] == ["1000:1000"]
    assert ("ENTRYPOINT", json.dumps(["isthmus"])) in last


def test_only_the_first_stage_may_reach_the_image_with_debian_packages() -> None:
    installing = {stage: text for stage, found in stages().items() for _, text in found if "apt-get install" in text}
    assert set(installing) == {"system", "tools"}
    for package in ("gcc", "python3-dev", "python3-venv", "pip"):
        assert not re.search(rf"\b{package}\b", installing["system"])
    for package in ("bash", "wget", "ca-certificates"):  # KubeRay's commands and probes; TLS
        assert re.search(rf"\b{package}\b", installing["system"])


def test_what_seldom_changes_comes_first() -> None:
    copied = [arguments.split()[0] for name, arguments in stages()[""] if name == "COPY"]
    assert copied[:3] == ["--from=dependencies", "--from=weights", "--from=project"]
    of_code = [stage for stage, found in stages().items() if any(text.startswith(". ") for _, text in found)]
    assert of_code == ["project"]
    own = [text for name, text in stages()["dependencies"] if name == "COPY" and not text.startswith("--from")]
    assert own == ["constraints*.txt /build/", "image/triton_driver.py image/cc /build/"]


def test_pip_never_keeps_a_cache_and_sees_settings_only_as_a_secret() -> None:
    for name, text in instructions():
        if name == "RUN" and "pip" in text and "install" in text and "--no-index" not in text:
            assert "--no-cache-dir" in text
            assert text.startswith("--mount=type=secret,id=pip.conf,target=/etc/pip.conf ")
    assert not re.search(r"https?://", (ROOT / "Dockerfile").read_text())


def test_the_requirements_are_those_of_the_project_for_kubernetes() -> None:
    (script,) = [text for name, text in stages()["requirements"] if name == "RUN"]
    assert 'extras["postgres"]' in script
    assert 'extras["kuberay"]' in script
    assert PROJECT["project"]["optional-dependencies"]["kuberay"] == ["ray[default]"]


def test_tools_are_pinned() -> None:
    lines = (ROOT / "image" / "tools.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if re.fullmatch(r"[\w-]+==[\d.]+", line)}
    assert pinned == {"cyclonedx-bom", "pip", "setuptools"}


def let_through(path: str) -> bool:
    """Whether a file or folder at the top is in the context: by .dockerignore's last pattern that matches."""
    verdict = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(path, line.removeprefix("!")):
            verdict = line.startswith("!")
    return verdict


def test_the_context_has_what_a_wheel_is_made_of_and_nothing_else() -> None:
    packages = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"]}
    named = {"pyproject.toml", "README.md", "LICENSE", "constraints-cpu.txt", "image"}
    assert {path.name for path in ROOT.iterdir() if let_through(path.name)} == packages | named
    assert not let_through(".git")
    assert not let_through(".env")


def test_what_is_copied_from_the_context_is_there() -> None:
    for name, text in instructions():
        if name == "COPY" and not text.startswith("--from"):
            for source in text.split()[:-1]:
                assert source == "." or list(ROOT.glob(source)), source
                assert source == "." or let_through(source.split("/")[0]), source


def test_arguments_of_the_makefile_are_those_of_the_dockerfile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    listed = re.search(r"\$\(foreach name,([A-Z_ ]+),\$\(if", makefile)
    assert listed is not None
    given = set(listed[1].split()) | set(re.findall(r"--build-arg ([A-Z_]+)=", makefile))
    assert given == {text.partition("=")[0] for name, text in instructions() if name == "ARG"}
    assert "id=pip.conf" in makefile
    for name in (*listed[1].split(), "WEIGHTS", "PIP_CONF", "BUILD_FLAGS"):  # set by who runs make, or by nobody
        assert not re.search(rf"^{name} *[:?+]?=", makefile, re.MULTILINE), name
