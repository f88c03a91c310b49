"""`isthmus store`: whose pages there are, and how they go."""

import json
from pathlib import Path

import pytest
import torch

from isthmus.cluster.cli.main import run
from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.registry import build_codec
from isthmus.kvtransfer.encoded import PageFormat
from isthmus.kvtransfer.storage.private import read_secret
from isthmus.kvtransfer.storage.store import PageStore

LAYERS = (LayerShape(kv_heads=1, head_dim=64),)
FORM = PageFormat(
    model_fingerprint="m", codec=build_codec("tq-k4v4", LAYERS, 64), layers=LAYERS, page_tokens=64, dtype=torch.float32
)


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Options of a store with pages of two tenants, encrypted."""
    key, folder = tmp_path / "store.key", tmp_path / "pages"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    store = PageStore(folder, 1 << 26, read_secret(key))
    for number, tenant in enumerate(("research", "research", "")):
        page_key = FORM.key(number.to_bytes(16, "big"), packed=True)
        store.enqueue(FORM, FORM.blank(page_key, 64, packed=True), tenant)
    store.close()
    return ["--store-dir", str(folder), "--store-key-file", str(key)]


def test_lists_and_forgets(capsys: pytest.CaptureFixture[str], settings: list[str]) -> None:
    code, out, _ = outcome(capsys, "store", "ls", *settings, "--json")
    assert code == 0
    assert {tenant["tenant"]: tenant["pages"] for tenant in json.loads(out)} == {"research": 2, "": 1}
    code, out, _ = outcome(capsys, "store", "ls", *settings)
    assert "'research'" in out
    code, out, _ = outcome(capsys, "store", "forget", "--tenant", "research", *settings)
    assert (code, out) == (0, "2 pages of tenant 'research' erased\n")
    code, out, _ = outcome(capsys, "store", "forget", "--tenant", "research", *settings, "--json")
    assert (code, json.loads(out)) == (0, {"tenant": "research", "pages": 0})
    assert "research" not in outcome(capsys, "store", "ls", *settings)[1]


def test_without_the_key_names_are_not_told(capsys: pytest.CaptureFixture[str], settings: list[str]) -> None:
    code, out, _ = outcome(capsys, "store", "ls", *settings[:2])
    assert (code, "research" in out, out.count("s-")) == (0, False, 2)
    code, _, err = outcome(capsys, "store", "forget", "--tenant", "research", *settings[:2])
    assert code == 1
    assert "name it, --store-key-file" in err


def test_another_key_erases_nothing(capsys: pytest.CaptureFixture[str], settings: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    other.write_bytes(bytes(32))
    other.chmod(0o600)
    code, _, err = outcome(capsys, "store", "forget", "--tenant", "research", *settings[:3], str(other))
    assert (code, "is it the key of this store" in err) == (1, True)
    assert outcome(capsys, "store", "forget", "--tenant", "research", *settings)[1].startswith("2 pages")


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], settings: list[str], tmp_path: Path) -> None:
    assert "no store: name its folder" in outcome(capsys, "store", "ls")[2]
    assert "there is no folder" in outcome(capsys, "store", "ls", "--store-dir", str(tmp_path / "none"))[2]
    Path(settings[3]).chmod(0o644)
    code, _, err = outcome(capsys, "store", "ls", *settings)
    assert (code, "has mode 0644" in err) == (1, True)
