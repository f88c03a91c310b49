"""Sender and receiver together: what arrives, and that nothing else can."""

import random
from dataclasses import replace

import pytest
import torch

from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.registry import build_codec
from isthmus.kvtransfer.encoded import PageFormat
from isthmus.kvtransfer.frame import MAX_FRAME_BYTES, Binding, FrameHeader, FrameWriter, frame_checksum
from isthmus.kvtransfer.hashing import page_hashes, page_salt
from isthmus.kvtransfer.receiver import KvReceiver
from isthmus.kvtransfer.sender import KvSender
from isthmus.proto.errors import Corrupt
from isthmus.proto.prefill_pb2 import KvCommit, KvFrame

LAYERS = (LayerShape(kv_heads=2, head_dim=64), LayerShape(kv_heads=2, head_dim=64, window=128))
PAGE = 64


def make_binding(**changes) -> Binding:
    binding = Binding(
        request_id="r1",
        attempt=1,
        model_fingerprint="m",
        codec="tq-k4v4",
        codec_hash="h",
        prompt_hash=b"0123456789abcdef",
    )
    return replace(binding, **changes)


def make_kv(tokens: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    shape = (len(LAYERS), 2, tokens, 2, 64)
    return torch.randn(shape, generator=generator).to(dtype)


def send(kv, binding=None, codec_name="tq-k4v4", chunk=128, held=0) -> tuple[list[KvFrame], KvCommit]:
    """All frames of a prompt computed in chunks, layer by layer, and the commit."""
    tokens = kv.shape[2]
    salt = page_salt("m", codec_name, "h")
    sender = KvSender(make_format(codec_name), page_hashes(range(tokens), PAGE, salt), tokens, held)
    writer = FrameWriter(binding or make_binding())
    frames = []
    for end in [*range(chunk, tokens, chunk), tokens]:
        due = sender.advance(end)
        for layer in range(len(LAYERS)):
            for section in due:
                keys, values = kv[layer, :, section.start : section.end]
                encoded = sender.encode(layer, section, keys, values)
                frames += writer.add(encoded.header, encoded.parts)
        frames += writer.flush()
    return frames, writer.commit()


def make_format(codec_name="tq-k4v4", layers=LAYERS, dtype=torch.float32) -> PageFormat:
    codec = build_codec(codec_name, layers, PAGE)
    return PageFormat(model_fingerprint="m", codec=codec, layers=layers, page_tokens=PAGE, dtype=dtype)


def make_receiver(tokens: int, binding=None, codec_name="tq-k4v4", held=0) -> KvReceiver:
    codec = build_codec(codec_name, LAYERS, PAGE)
    return KvReceiver(binding or make_binding(), codec, LAYERS, PAGE, tokens, held)


def receive(frames, commit, tokens, codec_name="tq-k4v4", held=0):
    receiver = make_receiver(tokens, codec_name=codec_name, held=held)
    kv = torch.full((len(LAYERS), 2, tokens, 2, 64), float("nan"))
    for frame in frames:
        for section in receiver.accept(frame):
            header = section.header
            keys, values = receiver.decode(section, torch.float32)
            kv[header.layer, 0, header.start : header.start + header.tokens] = keys
            kv[header.layer, 1, header.start : header.start + header.tokens] = values
    receiver.finish(commit)
    return kv


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 191, 192, 700])
@pytest.mark.parametrize("chunk", [64, 512])
def test_raw_arrives_exactly(tokens, chunk):
    kv = make_kv(tokens)
    frames, commit = send(kv, codec_name="raw", chunk=chunk)
    assert torch.equal(receive(frames, commit, tokens, codec_name="raw"), kv)


@pytest.mark.parametrize("codec_name", ["fp8", "tq-k4v4", "tq-k2v2"])
def test_packed_pages_come_between_raw_ones_in_bf16(codec_name):
    kv = make_kv(700)
    frames, commit = send(kv, codec_name=codec_name)
    got = receive(frames, commit, 700, codec_name=codec_name)
    raw = torch.ones(700, dtype=torch.bool)
    raw[64:576] = False
    assert torch.equal(got[:, :, raw], kv[:, :, raw].to(torch.bfloat16).float())
    error = (got - kv)[:, :, ~raw].pow(2).mean() / kv[:, :, ~raw].pow(2).mean()
    assert 1e-6 < error < 0.2, "packed, and not at random"


def test_a_held_prefix_is_not_sent():
    kv = make_kv(700)
    frames, commit = send(kv, held=128)
    got = receive(frames, commit, 700, held=128)
    assert got[:, :, :128].isnan().all()
    assert not got[:, :, 128:].isnan().any()


def test_frames_have_a_good_size():
    big = (LayerShape(kv_heads=8, head_dim=128),) * 4
    sender = KvSender(make_format("raw", big), page_hashes(range(4096), PAGE, b""), 4096, 0)
    writer = FrameWriter(make_binding(), min_bytes=MAX_FRAME_BYTES)
    kv = torch.zeros(2, 4096, 8, 128)
    frames = []
    for section in sender.advance(4096):
        encoded = sender.encode(0, section, *kv[:, section.start : section.end])
        frames += writer.add(encoded.header, encoded.parts)
    sizes = [len(frame.payload) for frame in frames]
    assert sum(sizes) == kv.numel() * 4
    assert set(sizes) == {MAX_FRAME_BYTES}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"request_id": "r2"}, "request 'r2'"),
        ({"attempt": 2}, "attempt 2"),
        ({"model_fingerprint": "other"}, "model 'other'"),
        ({"codec": "tq-k4v2"}, "codec 'tq-k4v2'"),
        ({"codec_hash": "x"}, "codec parameters 'x'"),
        ({"prompt_hash": b"another prompt's"}, 'prompt b"another'),
        ({"protocol_version": 99}, "protocol version 99"),
    ],
)
def test_frames_for_anything_else_are_refused(change, words):
    frames, _ = send(make_kv(200), binding=make_binding(**change))
    with pytest.raises(Corrupt, match=words):
        make_receiver(200).accept(frames[0])


def test_missing_reordered_and_repeated_frames_are_refused():
    frames, commit = send(make_kv(700))
    assert len(frames) >= 3
    with pytest.raises(Corrupt, match="frame 1 came where frame 0 was due"):
        make_receiver(700).accept(frames[1])
    receiver = make_receiver(700)
    receiver.accept(frames[0])
    with pytest.raises(Corrupt, match="frame 0 came where frame 1 was due"):
        receiver.accept(frames[0])
    with pytest.raises(Corrupt, match=r"has \d+ of 700 tokens at the commit"):
        receiver.finish(commit)


def test_a_wrong_digest_is_refused():
    frames, commit = send(make_kv(100))
    receiver = make_receiver(100)
    for frame in frames:
        receiver.accept(frame)
    with pytest.raises(Corrupt, match="commit does not match"):
        receiver.finish(KvCommit(frames=commit.frames, payload_bytes=commit.payload_bytes, digest=b"\0" * 16))


def test_sections_that_a_valid_checksum_covers_are_checked_all_the_same():
    frames, _ = send(make_kv(700), chunk=700)
    header = FrameHeader.unpack(frames[0].header)
    first = header.sections[0]
    lies = [
        replace(first, layer=7),
        replace(first, start=64),
        replace(first, tokens=32),
        replace(first, encoding="packed"),
        replace(first, end_head=1),
        replace(first, nbytes=first.nbytes - 1),
    ]
    for lie in lies:
        packed = replace(header, sections=(lie, *header.sections[1:])).pack()
        payload = frames[0].payload
        forged = KvFrame(header=packed, payload=payload, checksum=frame_checksum(packed, payload))
        with pytest.raises(Corrupt):
            make_receiver(700).accept(forged)


def test_no_mutated_frame_is_ever_taken():
    rng = random.Random(3)
    frames, _ = send(make_kv(200))
    frame = frames[0]
    for _ in range(2000):
        bad = KvFrame()
        bad.CopyFrom(frame)
        part = rng.choice(["header", "payload", "checksum"])
        if part == "checksum":
            bad.checksum ^= 1 << rng.randrange(64)
        else:
            data = bytearray(getattr(bad, part))
            kind = rng.randrange(3)
            if kind == 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[rng.randrange(len(data)) :]
            else:
                data.insert(rng.randrange(len(data)), rng.randrange(256))
            setattr(bad, part, bytes(data))
        with pytest.raises(Corrupt):
            make_receiver(200).accept(bad)


@pytest.mark.parametrize("header", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\xff" * 40])
def test_garbage_with_a_right_checksum_is_refused(header):
    frame = KvFrame(header=header, payload=b"", checksum=frame_checksum(header, b""))
    with pytest.raises(Corrupt):
        make_receiver(64).accept(frame)
