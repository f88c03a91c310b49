"""Text to tokens and back: real tokenizers of both kinds, and stop strings."""

import subprocess
import sys
from pathlib import Path

import pytest
from models import REAL_MODELS, model_path
from support.tiny_model import make_byte_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from isthmus.model.text.conversation import Conversation
from isthmus.model.text.tokenizer import Detokenizer, StopStrings, Tokenizer
from isthmus.proto.errors import InvalidRequest

TEXTS = (
    "The capital of France is Paris.",
    "In 2018,  42 cats\n\n\n\tate   31415 mice; x=1",
    " leading and trailing ",
    "héllo, 日本語 🙂👩‍👩‍👧 Ω≈ç√ नमस्ते",
    "don't I'LL <b>tags</b> <|x|>",
    "",
)


@pytest.fixture(scope="module", params=REAL_MODELS)
def path(request: pytest.FixtureRequest) -> Path:
    return Path(model_path(request.param))


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push([token]) for token in ids), detokenizer.finish()]


def test_ids_are_those_of_transformers(path: Path, tokenizer: Tokenizer) -> None:
    reference = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert [tokenizer.encode(text) for text in TEXTS] == reference(list(TEXTS))["input_ids"]
    assert tokenizer.vocab_size == len(reference)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_token_by_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert tokenizer.decode(ids) == text


def test_ids_of_smollm2_are_the_published_ones() -> None:
    tokenizer = Tokenizer(Path(model_path("smollm2-135m")))
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("x  42") == [104, 256, 36, 34]  # digits stand apart, so the spaces stay together
    assert tokenizer.encode("<|im_start|>user") == [1, 4093]
    chat = tokenizer.encode_chat(
        Conversation(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    )
    assert chat == tokenizer.encode(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_ids_of_gemma_begin_with_bos_and_know_its_turns() -> None:
    tokenizer = Tokenizer(Path(model_path("gemma3-270m")))
    assert tokenizer.encode("The capital of France is") == [2, 818, 5279, 529, 7001, 563]
    assert tokenizer.encode("<start_of_turn>user\n\n\nhi<end_of_turn>")[:3] == [2, 105, 2364]
    assert tokenizer.encode("<end_of_turn>") == [2, 106]
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.encode_chat(Conversation(messages=[{"role": "user", "content": "Hi"}]))


@pytest.mark.parametrize("converted", [False, True])
def test_truncation_and_padding_are_not_for_prompts(tmp_path: Path, converted: bool) -> None:
    make_byte_tokenizer(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(24)
    backend.enable_padding(length=24)
    backend.save(str(tmp_path / "tokenizer.json"))
    if converted:
        (tmp_path / "isthmus.json").write_text('{"name": "x", "source": "x.gguf", "converter": "2"}')
    tokenizer = Tokenizer(tmp_path)
    assert [len(tokenizer.encode("x" * length)) for length in (3, 100)] == [3, 100]


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([1, *tokenizer.encode("a b"), 2, 1]) == "a b"


def test_bytes_of_one_character_wait_for_each_other() -> None:
    tokenizer = Tokenizer(Path(model_path("tiny-llama")))  # one token a byte
    assert stream(tokenizer, tokenizer.encode("é🙂")) == ["", "é", "", "", "", "🙂", ""]
    half = tokenizer.encode("🙂")[:2]
    assert stream(tokenizer, half) == ["", "", "\N{REPLACEMENT CHARACTER}"]
    assert "".join(stream(tokenizer, [*half, *tokenizer.encode("x")])) == "\N{REPLACEMENT CHARACTER}x"
    assert stream(tokenizer, [511]) == ["", ""]  # of the model's vocabulary, and not the tokenizer's


def test_bytes_that_never_make_a_character_are_not_kept_forever() -> None:
    tokenizer = Tokenizer(Path(model_path("tiny-llama")))
    lone = tokenizer.encode("🙂")[1]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([lone] * 1000) == "\N{REPLACEMENT CHARACTER}" * 1000


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Tokenizer:
    """As Llama 2 has it: a space before the text that the decoder takes away again, and bytes for the unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    return Tokenizer(tmp_path)


def test_an_output_keeps_the_space_it_begins_with(sentencepiece: Tokenizer) -> None:
    assert sentencepiece.encode("a b") == [262, 263]
    assert stream(sentencepiece, [262, 263]) == [" a", " b", ""]  # it goes on after the prompt's text


def test_byte_fallback_makes_characters(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("a é")
    assert "".join(stream(sentencepiece, ids)) == " a é"
    assert stream(sentencepiece, ids)[-3:] == ["", "é", ""]


def make_chatting(folder: Path, template: str) -> Tokenizer:
    make_byte_tokenizer(folder, chat_template=template)
    return Tokenizer(folder)


def test_a_template_has_the_special_tokens_and_asks_for_an_answer(tmp_path: Path) -> None:
    tokenizer = make_chatting(
        tmp_path,
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
    )
    assert tokenizer.has_chat_template
    assert tokenizer.encode_chat(Conversation(messages=[{"role": "user", "content": "hi"}])) == [
        1,
        *tokenizer.encode("hi>"),
    ]


def test_bad_conversations_are_refused_with_the_reason(tmp_path: Path) -> None:
    tokenizer = make_chatting(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="refuses the conversation: roles must alternate"):
        tokenizer.encode_chat(Conversation(messages=[{"role": "user", "content": "hi"}]))
    with pytest.raises(InvalidRequest, match="role 'robot'; allowed: system, developer, user, assistant, tool"):
        tokenizer.encode_chat(Conversation(messages=[{"role": "robot", "content": "hi"}]))
    with pytest.raises(InvalidRequest, match="no messages"):
        tokenizer.encode_chat(Conversation(messages=[]))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InvalidRequest, match=r"tokenizer in .* cannot be loaded"):
        Tokenizer(tmp_path)


def test_a_converted_model_needs_no_torch_for_its_text() -> None:
    script = (
        "import sys; from isthmus.model.load.describe import describe_model\n"
        "from isthmus.model.text.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer(describe_model('smollm2-135m').path)\n"
        "from isthmus.model.text.conversation import Conversation\n"
        "tokenizer.encode_chat(Conversation(messages=[{'role': 'user', 'content': 'hi'}]))\n"
        "assert 'torch' not in sys.modules"
    )
    model_path("smollm2-135m")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("stops", "pieces", "given", "matched"),
    [
        (("END",), ["abc", "d"], ["abc", "d"], None),
        (("END",), ["abE", "N", "D!"], ["ab", "", ""], "END"),
        (("END",), ["abE", "N", "X"], ["ab", "", "ENX"], None),
        (("END",), ["ENEND"], ["EN"], "END"),
        (("aab",), ["aa", "ab"], ["", "a"], "aab"),
        (("\n\n",), ["x\n", "y\n", "\nz"], ["x", "\ny", ""], "\n\n"),
        (("b", "abc"), ["a", "bc"], ["", ""], "abc"),  # begins first
        (("ab", "abc"), ["abcd"], [""], "abc"),
        (("ab", "abc"), ["ab", "cd"], ["", ""], "ab"),  # nothing waits once one is whole
        (("é",), ["caf", "é"], ["caf", ""], "é"),
    ],
)
def test_stop_strings(stops: tuple[str, ...], pieces: list[str], given: list[str], matched: str | None) -> None:
    matcher = StopStrings(stops)
    assert [matcher.push(piece) for piece in pieces] == given
    assert matcher.matched == matched


def test_what_was_held_back_comes_at_the_end() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("the E") == "the "
    assert matcher.finish() == "E"
    assert matcher.finish() == ""
    ended = StopStrings(["x"])
    assert ended.push("axb") == "a"
    assert ended.push("more") == ""
    assert ended.finish() == ""
