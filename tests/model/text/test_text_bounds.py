"""What is known of a prompt's tokens by its length."""

import random
from pathlib import Path

import pytest
from models import REAL_MODELS, model_path
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from isthmus.model.text.conversation import Conversation
from isthmus.model.text.text_bounds import TextBound, bound_of
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.proto.errors import InvalidRequest

ALPHABETS = (
    " ",
    "\n \t",
    "ab",
    "abcdefghijklmnopqrstuvwxyz ",
    "=-*_/#",
    "\x04\x06a",
    "é日🙂 \u0301",
    "中文",
    "<|im_start|>",
)


@pytest.mark.parametrize("name", [*REAL_MODELS, "tiny-llama"])
def test_no_text_has_fewer_tokens(name: str) -> None:
    tokenizer = Tokenizer(Path(model_path(name)))
    bound = tokenizer.bound
    assert bound is not None
    draw = random.Random(1)
    for alphabet in ALPHABETS:
        for length in (1, 80, 2000):
            for text in ("".join(draw.choices(alphabet, k=length)), (alphabet * length)[:length]):
                assert bound.fewest_tokens(text) <= len(tokenizer.encode(text))


def test_the_bound_is_that_of_the_longest_token() -> None:
    assert bound_of(Tokenizer(Path(model_path("smollm2-135m")))._backend) == TextBound(81, "\x04\x06\x13\x14\x16\x1d")
    assert bound_of(Tokenizer(Path(model_path("gemma3-270m")))._backend) == TextBound(31, "")


def test_a_hopeless_prompt_is_refused_before_it_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(Path(model_path("smollm2-135m")))
    text = " " * 81 * 100
    assert len(tokenizer.encode(text, most_tokens=100)) > 100  # known only once it is tokenized
    tokenizer.encode_chat(Conversation(messages=[{"role": "user", "content": "hi"}]))
    monkeypatch.setattr(tokenizer, "_backend", None)
    for refused in (
        lambda: tokenizer.encode(text + " " * 81, most_tokens=100),
        lambda: tokenizer.encode_chat(Conversation(messages=[{"role": "user", "content": text}]), most_tokens=100),
    ):
        with pytest.raises(
            InvalidRequest, match=r"prompt of \d+ characters, 10\d tokens or more; allowed: at most 100"
        ):
            refused()


def bytes_backend() -> Backend:
    vocab = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def test_what_is_composed_first_counts_four_times() -> None:
    backend = bytes_backend()
    assert bound_of(backend) == TextBound(1, "")
    backend.normalizer = normalizers.NFC()
    assert bound_of(backend) == TextBound(4, "")


def test_no_bound_where_text_can_vanish() -> None:
    drops = bytes_backend()
    drops.normalizer = normalizers.Strip()
    blanks = bytes_backend()
    blanks.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    splits = bytes_backend()
    splits.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
    words = Backend(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    unknown = Backend(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True))
    silent = Backend(models.BPE({"a": 1}, []))
    assert [bound_of(each) for each in (drops, blanks, splits, words, unknown, silent)] == [None] * 6
