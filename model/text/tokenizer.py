"""Text to tokens and back, without torch for a model that was converted here.

The tokenizer is the one that transformers' `AutoTokenizer` makes of the folder. A folder that was converted here was
written by it, so its tokenizer.json is read directly: importing `AutoTokenizer` costs seconds, for it imports torch.
"""

import codecs
import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ...proto.errors import InvalidRequest
from ..cache import Note
from .chat_template import ChatTemplate
from .conversation import Conversation
from .marked_text import MarkedText
from .marks import END, START
from .text_bounds import BYTE_OF, TextBound, bound_of

# One text at a time uses one core, and a process that used its threads once warns at every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_TOOL_USE = "tool_use"  # of several templates that one for conversations with tools, as transformers takes it


class Tokenizer:
    """The tokenizer and the chat template of a model's folder. Any thread may use it."""

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        """`chat_template`: instead of what the folder has. InvalidRequest where the folder has no tokenizer that can
        be used."""
        read = _read_converted if Note.read(folder) else _read_by_transformers
        self._backend, self._templates, self._special, self.response_template = read(folder)
        if chat_template is not None:
            self._templates, self.response_template = {"default": chat_template}, None
        self._backend.no_truncation()  # of the text that it was made on, not of prompts
        self._backend.no_padding()
        self._bytes_of: dict[int, bytes] = {}
        self._anchor = self._backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_text = self._backend.decode(self._anchor)

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer knows; the model's own vocabulary may be larger, never smaller."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    @functools.cached_property
    def bound(self) -> TextBound | None:
        """What is known of a text's tokens by its length alone. Takes up to half a second once."""
        return bound_of(self._backend)

    def encode(self, text: str, *, most_tokens: int | None = None) -> list[int]:
        """The token ids of a prompt, with the special tokens that the model wants around it.

        A control token that the text spells is that token: a prompt is what the model sees, as it is. The interpreter's
        lock is free meanwhile. InvalidRequest where the text is so long that it has more than `most_tokens` for sure.
        """
        return self._encode(text, most_tokens, add_special_tokens=True)

    def encode_chat(
        self, conversation: Conversation, *, most_tokens: int | None = None, parse_special: bool = False
    ) -> list[int]:
        """The token ids of a conversation.

        A control token that any text of it spells is text, unless `parse_special`. InvalidRequest where there is no
        chat template, the template refuses the conversation or has no place for its tools, or it has more than
        `most_tokens` for sure.
        """
        template, marked = self.chat_template(bool(conversation.tools))
        text = template.render(conversation, parse_special=parse_special)
        if parse_special or not (START in text or END in text):
            return self._encode(text, most_tokens, add_special_tokens=False)
        self._check_length(text, most_tokens)
        return marked.encode(text)

    def _encode(self, text: str, most_tokens: int | None, *, add_special_tokens: bool) -> list[int]:
        self._check_length(text, most_tokens)
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _check_length(self, text: str, most_tokens: int | None) -> None:
        if most_tokens is not None and self.bound and (fewest := self.bound.fewest_tokens(text)) > most_tokens:
            raise InvalidRequest(
                f"prompt of {len(text)} characters, {fewest} tokens or more; allowed: at most {most_tokens}"
            )

    def chat_template(self, with_tools: bool) -> tuple[ChatTemplate, MarkedText]:
        """The template of conversations with or without tools; InvalidRequest where there is none, or no valid one."""
        if not self._templates:
            raise InvalidRequest("the model has no chat template; allowed: a prompt, or token ids")
        name = _TOOL_USE if with_tools and _TOOL_USE in self._templates else "default"
        compiled = self._compiled.get(name)
        if compiled is None:
            raise InvalidRequest("the model's chat template is for conversations with tools only; allowed: with tools")
        if isinstance(compiled, InvalidRequest):
            raise InvalidRequest(str(compiled))
        return compiled

    @functools.cached_property
    def _compiled(self) -> dict[str, tuple[ChatTemplate, MarkedText] | InvalidRequest]:
        """The templates, or what is wrong with one: found out once, for it may take a while."""
        return {name: self._compile(source) for name, source in self._templates.items()}

    def _compile(self, source: str) -> tuple[ChatTemplate, MarkedText] | InvalidRequest:
        added = [(token.content, token.special) for token in self._backend.get_added_tokens_decoder().values()]
        try:
            template = ChatTemplate(source, self._special, added)
        except InvalidRequest as error:
            return error
        return template, MarkedText(self._backend, template.control_tokens)

    @property
    def has_tools(self) -> bool:
        """Whether its chat template has a place for tools."""
        found = self._compiled.get(_TOOL_USE, self._compiled.get("default"))
        return isinstance(found, tuple) and found[0].traits.tools

    @property
    def may_tell_apart(self) -> bool:
        """Whether a chat template has tools, or marks what the model thinks."""
        sound = [found[0].traits for found in self._compiled.values() if not isinstance(found, InvalidRequest)]
        return any(traits.tools or traits.thinks for traits in sound)

    @property
    def end(self) -> str:
        """The name of the token that ends a sequence; empty where it is not known."""
        return str(self._special.get("eos_token") or "")

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of tokens that have no text in an output, by their names."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def end_of(self, token_ids: Sequence[int], most: int) -> str:
        """The text of the last tokens, at most `most`, with that of special tokens."""
        return self._backend.decode(list(token_ids[-most:]), skip_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens in the middle of a text; special tokens have none."""
        return b"".join(map(self.bytes_of, token_ids)).decode("utf-8", "replace")

    def bytes_of(self, token_id: int) -> bytes:
        """What one token adds to a text that it does not begin, in UTF-8; it may be part of a character."""
        if (known := self._bytes_of.get(token_id)) is None:
            known = self._bytes_of[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        # Decoded after an ordinary token, for decoders drop the space that a text's first token begins with.
        text = self._backend.decode([*self._anchor, token_id], skip_special_tokens=True)
        text = text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else text
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        token = self._backend.id_to_token(token_id) or ""
        if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):  # byte fallback, of SentencePiece
            return bytes.fromhex(byte[1])
        if all(char in BYTE_OF for char in token):  # byte-level BPE
            return bytes(BYTE_OF[char] for char in token)
        return text.encode()


class Detokenizer:
    """Turns the tokens of one output into text as they come. What it gave out never changes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens: whole characters; special tokens give none."""
        return self._decoder.decode(b"".join(map(self._tokenizer.bytes_of, token_ids)))

    def finish(self) -> str:
        """What is left at the end: replacement characters where the output stopped inside a character."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty."""
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string; nothing more once one was matched."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(place, -len(stop), stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            place, _, self.matched = min(found)  # of those that begin at one place the longest
            self._held = ""
            return text[:place]
        held = self._longest_beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, where the output ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for count in range(longest, 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0


# Chat templates by name, special tokens by name, and the response template.
_Read = tuple[Backend, dict[str, str], dict[str, Any], dict[str, Any] | None]


def _read_converted(folder: Path) -> _Read:
    """What stands in a folder that `load/convert.py` wrote."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    files = {"default": folder / "chat_template.jinja"}
    files[_TOOL_USE] = folder / "additional_chat_templates" / f"{_TOOL_USE}.jinja"
    special = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    templates = {name: file.read_text() for name, file in files.items() if file.exists()}
    return backend, templates, special, config.get("response_template")


def _read_by_transformers(folder: Path) -> _Read:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RecursionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidRequest(f"the tokenizer in {folder} cannot be loaded: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InvalidRequest(f"the tokenizer in {folder} ({type(tokenizer).__name__}) has no tokenizer.json")
    found = tokenizer.chat_template
    named = found if isinstance(found, dict) else {"default": found}
    templates = {name: named[name] for name in ("default", _TOOL_USE) if isinstance(named.get(name), str)}
    response_template = getattr(tokenizer, "response_template", None)
    return tokenizer.backend_tokenizer, templates, dict(tokenizer.special_tokens_map), response_template
