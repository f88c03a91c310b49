"""Regenerates the gRPC stubs beside the .proto files: `python proto/generate.py`.

The virtual path `isthmus/proto` gives the stubs their installed module name, so that messages pickle and the
files import each other as parts of the package.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent


def run_protoc(protos: list[Path], out: str, *generators: str) -> None:
    """Writes what the `generators` make of `protos` under the folder `out`; CalledProcessError where one fails."""
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-Iisthmus/proto={HERE}"),
            *(f"--{generator}={out}" for generator in generators),
            *(f"isthmus/proto/{proto.name}" for proto in protos),
        ],
        check=True,
        env={**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])},
    )


def generate(target: Path = HERE) -> None:
    """Writes all stubs into the folder `target`."""
    protos = sorted(HERE.glob("*.proto"))
    services = [proto for proto in protos if "\nservice " in proto.read_text()]
    with TemporaryDirectory() as scratch:
        run_protoc(protos, scratch, "python_out", "mypy_out")
        run_protoc(services, scratch, "grpc_python_out", "mypy_grpc_out")
        for stub in sorted(Path(scratch, "isthmus", "proto").iterdir()):
            text = stub.read_text().replace("from isthmus.proto import", "from . import")
            (target / stub.name).write_text(text)


if __name__ == "__main__":
    generate()
