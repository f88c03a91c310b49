"""What a model's folder must not hold: pickles, code, links out of it, headers that lie. Each has its reason."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import model_path
from safetensors.torch import load_file, save_file

from isthmus.model.files.bounded import parse_json
from isthmus.model.files.folder import check_folder
from isthmus.model.files.safetensors_header import check_safetensors
from isthmus.model.load.describe import describe_model
from isthmus.model.load.loader import load_model
from isthmus.model.text.conversation import Conversation
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.proto.errors import InvalidRequest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small model that may be changed."""
    return Path(shutil.copytree(model_path("tiny-llama"), tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def header(folder: Path, text: bytes | dict[str, Any], data: bytes = b"") -> None:
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes}


def leads_out(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder.parent / "outside.json")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../outside.json")


def index(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))


def big(path: Path, size: int) -> None:
    with path.open("ab") as file:
        file.truncate(size)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickles only": (as_pickle, r"pytorch_model\.bin is a pickle, which runs code .* convert it"),
    "code": (lambda f: change(f / "config.json", auto_map={"AutoConfig": "x.Y"}), "names code of the model's own"),
    "code within": (
        lambda f: change(f / "config.json", text_config={"auto_map": {"AutoConfig": "x.Y"}}),
        "names code of the model's own",
    ),
    "code of a tokenizer": (
        lambda f: change(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
        "names code of the model's own",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter"),
    "a link out": (leads_out, "which is not in the model's folder"),
    "a link to nothing": (lambda f: (f / "x.json").symlink_to("y.json"), "link to nothing"),
    "an absolute index": (lambda f: index(f, "/etc/passwd"), "names '/etc/passwd'"),
    "an index that leads out": (lambda f: index(f, "../../etc/passwd"), r"names '\.\./\.\./etc/passwd'"),
    "an index that leads out to safetensors": (lambda f: index(f, "../x.safetensors"), "allowed: safetensors files"),
    "an index of pickles": (lambda f: index(f, "pytorch_model.bin"), "allowed: safetensors files beside it"),
    "an index of nothing": (lambda f: index(f, "x.safetensors"), "which is not there"),
    "a pipe": (lambda f: os.mkfifo(f / "x.safetensors"), "is no ordinary file"),
    "a pipe for a config": (
        lambda f: ((f / "generation_config.json").unlink(), os.mkfifo(f / "generation_config.json")),
        "is no ordinary file",
    ),
    "a large config": (lambda f: big(f / "config.json", 9 << 20), "config.json has 9437184 bytes; allowed: at most"),
    "a large tokenizer": (lambda f: big(f / "tokenizer.json", 129 << 20), "tokenizer.json has .* allowed: at most"),
    "a large template": (lambda f: big(f / "chat_template.jinja", 1 << 20), "chat_template.jinja has .* allowed"),
    "a nested config": (lambda f: (f / "config.json").write_text("[" * 10**6), "is nested too deep"),
    "a somewhat nested config": (
        lambda f: (f / "config.json").write_text('{"a":' * 65 + "1" + "}" * 65),
        "is nested too deep; allowed: 64",
    ),
    "a config with two values": (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "a name occurs twice"),
    "a config of no object": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "many layers": (lambda f: change(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers is 1e"),
    "a wide model": (lambda f: change(f / "config.json", hidden_size=10**12), "hidden_size is 1e"),
    "a long header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
        "a header of 18446744073709",
    ),
    "a header of nothing": (lambda f: (f / "model.safetensors").write_bytes(b"\x01"), "a header of 1 bytes"),
    "a nested header": (lambda f: header(f, b"[" * 10**5), "is nested too deep"),
    "a header of no object": (lambda f: header(f, b"[]"), "is not an object"),
    "an overlap": (
        lambda f: header(f, tensor() | {"x": tensor()["w"]}, bytes(16)),
        "begins at 0, the one before ends at 16",
    ),
    "a gap": (lambda f: header(f, tensor(data_offsets=[4, 20]), bytes(20)), "begins at 4, the one before ends at 0"),
    "data past the end": (lambda f: header(f, tensor(), bytes(8)), "8 bytes of tensors, and the header tells of 16"),
    "data that nobody names": (lambda f: header(f, tensor(), bytes(17)), "17 bytes of tensors"),
    "a wrong size": (lambda f: header(f, tensor(shape=[3, 2]), bytes(16)), "which is not its size"),
    "a shape without end": (lambda f: header(f, tensor(shape=[2**62, 2**62]), bytes(16)), "that cannot be"),
    "a negative shape": (lambda f: header(f, tensor(shape=[-2, -2]), bytes(16)), "that cannot be"),
    "a shape of floats": (lambda f: header(f, tensor(shape=[2.0, 2]), bytes(16)), "that cannot be"),
    "many dimensions": (lambda f: header(f, tensor(shape=[1] * 99), bytes(16)), "that cannot be"),
    "an unknown dtype": (lambda f: header(f, tensor(dtype="F1000"), bytes(16)), "has no known dtype"),
    "a dtype that is a list": (lambda f: header(f, tensor(dtype=[]), bytes(16)), "has no known dtype"),
    "no tensor": (lambda f: header(f, {"w": 3}), "has no known dtype"),
    "two of one name": (lambda f: header(f, b'{"w": 1, "w": 2}'), "a name occurs twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_soon_with_its_reason(folder: Path, case: str) -> None:
    spoil, reason = REFUSED[case]
    spoil(folder)
    began = time.thread_time()
    with pytest.raises(InvalidRequest, match=reason):
        describe_model(str(folder))
    assert time.thread_time() - began < 1.0


def test_the_models_of_tests_pass(folder: Path) -> None:
    check_folder(folder)
    check_folder(Path(model_path("smollm2-135m")))


def test_headers_of_the_library_pass(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(0), "c": torch.zeros((), dtype=torch.bfloat16)}, tmp_path / "x")
    assert check_safetensors(tmp_path / "x") == 3


def test_links_within_the_folder_and_those_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(folder / "config.real")
    (folder / "config.json").symlink_to("config.real")
    check_folder(folder)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(Path(model_path("tiny-llama")).iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert describe_model(str(snapshot)).vocab_size == 512


def test_the_command_in_the_refusal_converts(folder: Path) -> None:
    before = load_file(folder / "model.safetensors")
    as_pickle(folder)
    with pytest.raises(InvalidRequest) as refused:
        load_model(str(folder), dtype="fp32", device="cpu")
    command = shlex.split(re.search(r"python -c .*", str(refused.value))[0])  # type: ignore[index]
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, timeout=120)
    converted = folder.with_name("copy-safetensors")
    assert load_model(str(converted), dtype="fp32", device="cpu").vocab_size == 512
    assert Tokenizer(converted).encode("hi") == Tokenizer(folder).encode("hi")
    after = load_file(converted / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_a_pickle_by_itself_is_refused_and_one_beside_safetensors_is_never_opened(folder: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    torch.save(Harm(), folder / "pytorch_model.bin")
    with pytest.raises(InvalidRequest, match="is a pickle"):
        describe_model(str(folder / "pytorch_model.bin"))
    load_model(str(folder), dtype="fp32", device="cpu")
    assert not (tmp_path / "harm").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "harm").exists(), "reading it would have done harm"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_tokenizer_files_that_are_no_such_are_refused_not_crashed_on(folder: Path, name: str) -> None:
    for text in (b"[" * 10**6, b'{"model":' * 10**5, b"\xff\xfe", b"{}", b'{"version": 1e999}'):
        (folder / name).write_bytes(text)
        try:
            check_folder(folder)
            Tokenizer(folder).encode_chat(Conversation(messages=[{"role": "user", "content": "x"}]))
        except InvalidRequest:
            continue
        assert text == b"{}" or name == "chat_template.jinja"


def test_json_of_any_shape_is_bounded() -> None:
    assert parse_json(b'{"a": [1, {"b": []}]}', "x") == {"a": [1, {"b": []}]}
    for text in (b"", b"{", b"nul", b"\xff", b"1" * 5000):
        with pytest.raises(InvalidRequest, match="x is not JSON"):
            parse_json(text, "x")


def test_the_source_never_trusts_code_of_a_model() -> None:
    folders = (
        "cluster",
        "decode",
        "kernels",
        "kvtransfer",
        "model",
        "prefill",
        "proto",
        "worker",
        "benchmarks",
        "tests",
    )
    wanted = re.compile(r"trust_remote_code\s*=\s*(?!False)|weights_only\s*=\s*False|use_safetensors\s*=\s*False")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        assert not wanted.search(path.read_text()) or path == Path(__file__), path
