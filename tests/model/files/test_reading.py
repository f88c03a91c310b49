"""Damaged files of a model end in one line that names the file, whatever a library raises of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import make_tiny, tiny_config

from isthmus.cluster.text.served import load_served_model
from isthmus.model.files.reading import reading
from isthmus.proto.errors import InvalidRequest, NotFound


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(tiny_config("llama", {}), folder)
    return folder


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (KeyError("rope"), "x.json cannot be loaded: KeyError: 'rope'"),
        (Exception("expected value\n  at line 1"), "x.json cannot be loaded: expected value at line 1"),
        (IndexError(), "x.json cannot be loaded: IndexError"),
        (ValueError("y" * 1000), "x.json cannot be loaded: " + "y" * 300),
    ],
)
def test_what_libraries_raise_is_told_of_the_file(raised: Exception, text: str) -> None:
    with pytest.raises(InvalidRequest, match="^" + re.escape(text) + "$") as error, reading("x.json"):
        raise raised
    assert error.value.__cause__ is raised


@pytest.mark.parametrize(
    "raised", [NotFound("gone"), AssertionError("a bug"), MemoryError(), KeyboardInterrupt(), SystemExit(1)]
)
def test_what_is_no_fault_of_the_file_is_raised_as_it_is(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as error, reading("x.json"):
        raise raised
    assert error.value is raised


DAMAGES: list[tuple[str, str, Any]] = [
    *(("config.json", "max_position_embeddings", value) for value in (10**400, "x", None, [], -1)),
    *(("config.json", "vocab_size", value) for value in (0, {}, 1.5)),
    *(("config.json", "architectures", value) for value in (5, [None], [[]])),
    *(("config.json", "text_config", value) for value in ("x", 7)),
    *(("config.json", "num_hidden_layers", value) for value in (10**400, -(10**400))),
    *(("generation_config.json", "eos_token_id", value) for value in (True, 1.5, "x", ["x"], {}, 10**400)),
    *(("tokenizer.json", "model", value) for value in (None, "x", {"type": "BPE"})),
    *(("tokenizer.json", "added_tokens", value) for value in (7, [{}], [[]])),
    *(("tokenizer_config.json", "chat_template", value) for value in (5, True)),
]


@pytest.mark.parametrize(("name", "key", "value"), DAMAGES)
def test_a_damaged_file_is_named(tiny: Path, tmp_path: Path, name: str, key: str, value: Any) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    document = json.loads((tiny / name).read_text())
    (tmp_path / name).write_text(json.dumps(document | {key: value}))
    with pytest.raises(InvalidRequest) as error:
        load_served_model(str(tmp_path))
    assert name in str(error.value) and "\n" not in str(error.value)
