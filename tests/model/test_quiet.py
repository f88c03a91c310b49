"""Loading a model that is here asks no network and says nothing."""

import socket
from pathlib import Path
from typing import NoReturn

import pytest
from models import model_path

from isthmus.model.load.describe import describe_model
from isthmus.model.load.loader import load_model
from isthmus.model.text.tokenizer import Tokenizer


@pytest.mark.parametrize("name", ["tiny-mixtral", "smollm2-135m"])
def test_a_model_that_is_here_needs_no_network_and_prints_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = model_path(name)

    def refuse(*_arguments: object) -> NoReturn:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    capfd.readouterr()
    describe_model(path)
    load_model(path, dtype="fp32", device="cpu")
    Tokenizer(Path(path))
    assert capfd.readouterr() == ("", "")
