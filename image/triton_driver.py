"""Compiles the C module that Triton launches CUDA kernels by, so that an image needs no compiler at run time.

    python triton_driver.py FOLDER      puts driver.c and cuda_utils.so into FOLDER/triton

Triton compiles it with `$CC` where its cache has none (`triton/backends/nvidia/driver.py`), linked with a libcuda.so.1
that comes with the driver of a GPU's host. No such host builds images: an empty library of that name stands in, since
the symbols are looked up when the module is loaded.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        library = Path(temporary, "libcuda.so.1")
        empty = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull, "-o", str(library)]
        subprocess.run(empty, check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = temporary
        os.environ["TRITON_CACHE_DIR"] = str(Path(temporary, "cache"))
        from triton.backends.nvidia import driver
        from triton.runtime.build import compile_so_from_file

        source = Path(driver.dirname, "driver.c")
        module = compile_so_from_file(
            str(source), "cuda_utils", driver.library_dirs(), driver.include_dirs, driver.libraries
        )
        shutil.copyfile(module, folder / "cuda_utils.so")
        shutil.copyfile(source, folder / "driver.c")
    print(f"compiled Triton's driver: {folder / 'cuda_utils.so'}")


if __name__ == "__main__":
    main(Path(sys.argv[1], "triton"))
