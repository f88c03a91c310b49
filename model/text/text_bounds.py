"""How much text a token can stand for: what a prompt that is too long is known by before it is tokenized."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

_COMPOSED = 4  # characters at most that canonical composition makes one of


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes the 256 bytes as: printable Latin-1 for itself, others from U+0100 on.

    Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.2, and its code.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


@dataclass(frozen=True)
class TextBound:
    """What is known of a tokenizer in which every token stands for a bounded number of characters."""

    characters: int  # of the longest token
    dropped: str  # characters that give no token at all

    def fewest_tokens(self, text: str) -> int:
        """A text has this many tokens or more."""
        return (len(text) - sum(map(text.count, self.dropped))) // self.characters


def bound_of(backend: Backend) -> TextBound | None:
    """The bound of a tokenizer; None where a step of it drops text, or makes one token of any number of characters."""
    if not isinstance(backend.model, models.BPE):  # others have one token for any unknown word
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # such a token takes all the blanks beside it
    normal, split = list(_steps(backend.normalizer)), list(_steps(backend.pre_tokenizer))
    if not all(map(_keeps_text, normal)) or not all(map(_splits_only, split)):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    byte_level = any(step["type"] == "ByteLevel" for step in normal + split)
    if (dropped := _dropped(backend.model, vocabulary, byte_level)) is None:
        return None
    composed = any(step["type"] in ("NFC", "NFKC") for step in normal)
    return TextBound(max(map(len, vocabulary)) * (_COMPOSED if composed else 1), dropped)


def _steps(component: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as tokenizer.json has them."""
    if component is None:
        return
    pending = [json.loads(component.__getstate__())]
    while pending:
        step = pending.pop()
        if step["type"] == "Sequence":
            pending += step.get("normalizers") or step.get("pretokenizers") or []
        else:
            yield step


def _keeps_text(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        replaced = step["pattern"].get("String")
        return replaced is not None and len(step["content"]) >= len(replaced)
    return step["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Prepend", "ByteLevel", "Lowercase")


def _splits_only(step: dict[str, Any]) -> bool:
    return step["type"] in ("ByteLevel", "Digits", "Metaspace", "Split") and step.get("behavior") != "Removed"


def _dropped(model: Any, vocabulary: dict[str, int], byte_level: bool) -> str | None:
    """ASCII characters without a token, which BPE leaves out; None where others may be left out too.

    All others have a byte of 0x80 to 0xBF in UTF-8, which is enough for a token.
    """
    if byte_level:
        missing = [byte for char, byte in BYTE_OF.items() if byte < 0xC0 and char not in vocabulary]
        return "".join(map(chr, missing)) if all(byte < 0x80 for byte in missing) else None
    if model.byte_fallback:
        return "" if all(f"<0x{byte:02X}>" in vocabulary for byte in range(0xC0)) else None
    return "" if model.unk_token is not None and not model.fuse_unk else None
