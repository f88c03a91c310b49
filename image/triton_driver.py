"""Compiles the C module that Triton launches CUDA kernels by, so that an image needs no compiler at run time.

    python triton_driver.py FOLDER      puts driver.c and cuda_utils.so into FOLDER/triton

Triton compiles it with `$CC` where its cache has none (`triton/backends/nvidia/driver.py`), linked with a libcuda.so.1
that comes with the driver of a GPU's host. No such host builds images: a library with the same names stands in, so that
the module is marked as needing libcuda.so.1, whose functions are looked up when it is loaded.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from triton.backends.nvidia import driver
from triton.runtime.build import compile_so_from_file


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(driver.dirname, "driver.c")
    shutil.copyfile(source, folder / "driver.c")
    with tempfile.TemporaryDirectory() as temporary:
        build_stand_in(source.read_text(), Path(temporary))
        os.environ["TRITON_LIBCUDA_PATH"] = temporary
        os.environ["TRITON_CACHE_DIR"] = str(Path(temporary, "cache"))
        libraries, headers = driver.library_dirs(), driver.include_dirs
        module = compile_so_from_file(str(source), "cuda_utils", libraries, headers, driver.libraries)
        shutil.copyfile(module, folder / "cuda_utils.so")
    print(f"compiled Triton's driver: {folder / 'cuda_utils.so'}")


def build_stand_in(source: str, folder: Path) -> None:
    """libcuda.so.1 with every name in the source that looks like a function of CUDA's driver; none does anything."""
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", source)))
    code = "".join(f"int {name}(void) {{ return 999; /* CUDA_ERROR_UNKNOWN */ }}\n" for name in names)
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, input=code, text=True, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1], "triton"))
