"""Reads files as isthmus does, one for each line on stdin; says on stdout how it ended: `targets.py MODEL FOLDER`.

"read": it was fine; "refused": with an error that is meant for a person; else the class of what was raised.
"""

import json
import os
import resource
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
MORE_BYTES = 3 << 30  # of address space, beyond what the imports took
NAMES = {"safetensors": "model.safetensors", "gguf": "model.gguf"}


def main() -> None:
    """Until stdin ends."""
    model, folder = (Path(name) for name in sys.argv[1:])
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    # Imports all there is to import, and compiles what a model's first load compiles.
    _read("config", model / "config.json", model, folder / "as-it-is")
    _read("safetensors", model / "model.safetensors", model, folder / "as-it-is")
    _bound_memory()
    print("ready", file=told, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ended, text = _ended(asked["target"], Path(asked["path"]), model, folder / "copy")
        print(json.dumps({"ended": ended, "text": text[:300]}), file=told, flush=True)


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _ended(target: str, path: Path, model: Path, folder: Path) -> tuple[str, str]:
    from isthmus.proto.errors import IsthmusError

    try:
        _read(target, path, model, folder)
    except IsthmusError as error:
        return ("refused", str(error)) if "\n" not in str(error) else ("more than one line", str(error))
    except BaseException as error:
        return type(error).__name__, str(error)
    return "read", ""


def _read(target: str, path: Path, model: Path, folder: Path) -> None:
    if target == "jsonl":
        from isthmus.cluster.client.batch_lines import MAX_REASON, BadLine, read_lines

        for line in read_lines(path):
            if isinstance(line, BadLine):
                assert len(line.reason.encode()) <= 4 * MAX_REASON and line.reason, "a reason out of its bounds"
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if target == "gguf":
        return _convert(path, folder)
    for file in model.iterdir():
        _put(file, folder / file.name)
    damaged = folder / NAMES.get(target, f"{target}.json")
    damaged.unlink(missing_ok=True)
    shutil.copyfile(path, damaged)
    if target == "safetensors":
        from isthmus.model.load.loader import load_model

        load_model(str(folder), dtype="fp32", device="cpu")
        return
    from isthmus.cluster.text.served import load_served_model

    served = load_served_model(str(folder))
    ids = served.tokenizer.encode("hello <eos> world", most_tokens=1000)
    decoder = served.new_decoder()
    decoder.push(ids)
    decoder.finish()


def _put(file: Path, where: Path) -> None:
    """The same file there too; links by name would lead out of the folder, which is refused."""
    try:
        os.link(file, where)
    except OSError:  # another file system
        shutil.copyfile(file, where)


def _convert(path: Path, folder: Path) -> None:
    """As the process that isthmus starts for it; what that raises is told in one line, whatever it is."""
    import gguf

    from isthmus.model.files.gguf_header import check_gguf
    from isthmus.model.load.convert import convert
    from isthmus.proto.errors import InvalidRequest

    shutil.copyfile(path, folder / "model.gguf")
    check_gguf(folder / "model.gguf")
    plain = gguf.GGUFReader, gguf.get_tensor_name_map  # convert makes them keep what they read
    try:
        convert(folder / "model.gguf", folder)
    except Exception as error:
        raise InvalidRequest(type(error).__name__) from error
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = plain


if __name__ == "__main__":
    main()
