"""Prompts and grammars from where people have them: an argument, a file, a pipe."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ....proto.common_pb2 import Grammar


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt from where it was given; usage errors where it was given twice or not at all."""
    if argument is not None and file is not None:
        raise typer.BadParameter("give the prompt as an argument or with --file, not both")
    if file is not None:
        return decoded(_bytes_of(file), str(file))
    if argument is not None and argument != "-":
        return argument
    if argument is None and sys.stdin.isatty():
        raise typer.BadParameter("no prompt; give it as an argument, with --file, or on stdin")
    return decoded(sys.stdin.buffer.read(), "stdin")


def read_grammar(schema: Path | None, regex: str | None) -> "Grammar | None":
    """What an answer must be; a usage error where two ways are given."""
    from ....proto.common_pb2 import Grammar

    if schema is not None and regex is not None:
        raise typer.BadParameter("give --json-schema or --regex, not both")
    if schema is not None:
        return Grammar(json_schema=decoded(_bytes_of(schema), str(schema)))
    return Grammar(regex=regex) if regex is not None else None


def _bytes_of(file: Path) -> bytes:
    from ....proto.errors import InvalidRequest

    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None


def decoded(raw: bytes, where: str) -> str:
    from ....proto.errors import InvalidRequest

    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise InvalidRequest(
            f"{where} is not UTF-8 text (byte 0x{byte:02x} at offset {error.start}); allowed: UTF-8"
        ) from None
