"""A model is what its manifest says, byte for byte, or nothing of it is loaded."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import model_path

from isthmus.cluster.text.served import load_served_model
from isthmus.decode.config import DecodeConfig
from isthmus.model.files import manifest as manifests
from isthmus.model.files.manifest import beside, files_of, read_manifest, verify_model, write_manifest
from isthmus.model.load.loader import load_model
from isthmus.model.load.packages import gguf_of
from isthmus.model.load.sources import locate
from isthmus.proto.errors import InvalidRequest
from isthmus.worker.model_setup import load_configured


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small model that may be changed."""
    return Path(shutil.copytree(model_path("tiny-llama"), tmp_path / "copy"))


@pytest.fixture
def manifest(folder: Path, tmp_path: Path) -> Path:
    write_manifest(folder, tmp_path / "m.json", "copy")
    return tmp_path / "m.json"


def flip_one_bit(folder: Path) -> None:
    """Of the last weight; size and times are as before."""
    path = folder / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (flip_one_bit, "model.safetensors has another content"),
    "a config": (lambda f: (f / "config.json").write_text("{}"), "config.json has 2 bytes, not"),
    "a file less": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a file more": (
        lambda f: (f / "chat_template.jinja").write_text("x"),
        "chat_template.jinja is not in the manifest",
    ),
    "a file more below": (
        lambda f: (
            (f / "additional_chat_templates").mkdir(),
            (f / "additional_chat_templates/x.jinja").write_text("x"),
        ),
        "additional_chat_templates/x.jinja is not in the manifest",
    ),
}


def test_an_unchanged_model_is_as_in_its_manifest(folder: Path, manifest: Path) -> None:
    done = verify_model(folder, manifest)
    assert done.files == len(list(folder.iterdir()))
    assert done.nbytes == sum(path.stat().st_size for path in folder.iterdir())
    said = json.loads(manifest.read_text())
    assert (said["version"], said["model"]) == (1, "copy")
    expected = subprocess.run(["sha256sum", folder / "config.json"], capture_output=True, text=True, check=True)
    assert said["files"]["config.json"]["sha256"] == expected.stdout.split()[0]


@pytest.mark.parametrize("case", CHANGES)
async def test_no_worker_and_no_gateway_starts_with_another(folder: Path, manifest: Path, case: str) -> None:
    before = load_served_model(str(folder), str(manifest)).fingerprint
    spoil, reason = CHANGES[case]
    spoil(folder)
    with pytest.raises(InvalidRequest, match=f"{reason}.*nothing of it is loaded"):
        load_served_model(str(folder), str(manifest))
    config = DecodeConfig(model=str(folder), model_manifest=str(manifest), dtype="fp32", device="cpu")
    with pytest.raises(InvalidRequest, match=reason):
        await load_configured(config)
    with pytest.raises(InvalidRequest, match=reason):
        load_model(str(folder), dtype="fp32", device="cpu", manifest=str(manifest))
    assert before


async def test_a_worker_starts_with_the_right_one(folder: Path, manifest: Path) -> None:
    config = DecodeConfig(model=str(folder), model_manifest=str(manifest), dtype="fp32", device="cpu")
    assert (await load_configured(config)).vocab_size == 512


def test_a_gguf_file_is_verified_before_it_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    write_manifest(file, beside(file), "x")
    assert beside(file) == tmp_path / "x.gguf.manifest.json"
    assert verify_model(file, beside(file)).files == 1
    file.write_bytes(b"GGUF" + bytes(99) + b"x")
    with pytest.raises(InvalidRequest, match=r"x\.gguf has another content"):
        locate(str(file), str(beside(file)))
    assert not (tmp_path / "cache").exists()


def test_a_packaged_model_is_its_gguf_file(tmp_path: Path) -> None:
    file = gguf_of("smollm2-135m")
    write_manifest(file, tmp_path / "m.json", "smollm2-135m")
    assert locate("smollm2-135m", str(tmp_path / "m.json")).name == "smollm2-135m"
    assert list(read_manifest(tmp_path / "m.json")) == [file.name]


def test_hidden_files_are_nobodys_and_links_to_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "x").write_text("x")
    (folder / "original").mkdir()
    (folder / "original" / "y").write_text("y")
    assert set(files_of(folder)) == {*(path.name for path in folder.iterdir() if path.is_file()), "original/y"}
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(InvalidRequest, match="is a link to a folder"):
        files_of(folder)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"version": 2, "files": {}}', '{"version": 1, "files": []}'),
        *('{"version": 1, "files": {"a": {}}}', '{"version": 1, "files": {"a": {"sha256": "x", "bytes": 1}}}'),
        '{"version": 1, "files": {"a": {"sha256": "' + "0" * 64 + '", "bytes": "1"}}}',
        '{"version": 1, "files": {"a": null}}',
    ],
)
def test_what_is_no_manifest_verifies_nothing(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(InvalidRequest):
        verify_model(folder, tmp_path / "m.json")
    with pytest.raises(InvalidRequest, match=r"the manifest .* cannot be read: No such file"):
        verify_model(folder, tmp_path / "none.json")


def test_progress_is_told_while_large_files_are_hashed(
    folder: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "_TELL_S", 0.0)
    told: list[str] = []
    verify_model(folder, manifest, told.append)
    assert any(line.startswith("hashed 0.0 of 0.0 GB") for line in told)
