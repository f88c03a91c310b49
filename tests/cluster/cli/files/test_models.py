"""`isthmus models`: still a list where nothing more is said, and `verify`."""

import json
from pathlib import Path

import pytest
from models import model_path

from isthmus.cluster.cli.main import run


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_lists_where_no_command_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "models")
    assert code == 0
    assert "smollm2-135m" in out


def test_a_manifest_is_written_and_verified(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, file = model_path("tiny-llama"), tmp_path / "m.json"
    code, out, _ = outcome(capsys, "models", "verify", model, "--write", str(file))
    assert (code, "written to" in out) == (0, True)
    code, out, _ = outcome(capsys, "models", "verify", model, "--manifest", str(file), "--json")
    assert code == 0
    assert json.loads(out)["files"] == len(json.loads(file.read_text())["files"])
    said = json.loads(file.read_text())
    said["files"]["config.json"]["sha256"] = "0" * 64
    file.write_text(json.dumps(said))
    code, out, err = outcome(capsys, "models", "verify", model, "--manifest", str(file))
    assert (code, out) == (1, "")
    assert "config.json has another content; nothing of it is loaded" in err
    assert err.startswith("error: INVALID_ARGUMENT: ")


def test_misuse_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = model_path("tiny-llama")
    assert outcome(capsys, "models", "verify", model, "--manifest", "a", "--write", "b")[0] == 2
    code, _, err = outcome(capsys, "models", "verify", model, "--manifest", str(tmp_path / "none"))
    assert code == 1
    assert "cannot be read: No such file" in err
