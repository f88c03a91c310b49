"""Settings from a file and flags, and how mistakes in them read."""

from pathlib import Path

import pytest

from isthmus.cluster.config import ClusterConfig, load_config
from isthmus.proto.errors import InvalidRequest


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "cluster.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_defaults() -> None:
    config = load_config(None, {"port": None})
    assert (config.prefill, config.decode, config.model, config.codec) == (1, 1, "smollm2-135m", "tq-k4v4")
    assert (config.host, config.port, config.workers) == ("127.0.0.1", 50051, 2)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "decode: 3\ncodec: raw\nprefill_worker:\n  chunk_tokens: 256\n")
    config = load_config(path, {"decode": 2, "codec": None})
    assert (config.decode, config.codec) == (2, "raw")
    settings = config.worker_settings("prefill", "prefill-0", "127.0.0.1:0", 1)
    assert (settings["chunk_tokens"], settings["default_codec"], settings["name"]) == (256, "raw", "prefill-0")


def test_workers_of_up_have_names_and_addresses_of_their_own(tmp_path: Path) -> None:
    """The file's are those of a worker that is started by hand with the same file."""
    section = "{name: mine, listen: '0.0.0.0:7001', advertise: 'h:7001', host_cache_gib: 4}"
    config = load_config(written(tmp_path, f"prefill_worker: {section}"), {})
    settings = config.worker_settings("prefill", "prefill-0", "127.0.0.1:0", 1)
    names = ("name", "listen", "advertise", "host_cache_gib")
    assert [settings[name] for name in names] == ["prefill-0", "127.0.0.1:0", None, 4]
    by_hand = config.process_settings("prefill", default_threads=1)
    assert [by_hand[name] for name in names] == ["mine", "0.0.0.0:7001", "h:7001", 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decodes: 2", "unknown key 'decodes' (did you mean 'decode'?); allowed: prefill, decode, model"),
        ("decode: -1", "decode is -1: Input should be greater than or equal to 0"),
        ("decode: many", "decode is 'many': Input should be a valid integer"),
        ("codec: zip", "codec is 'zip': no codec 'zip'; allowed: "),
        (
            "decode_worker: {max_batsch: 3}",
            "decode_worker: unknown key 'max_batsch' (did you mean 'max_batch'?)",
        ),
        ("prefill_worker: {chunk_tokens: 100}", "chunk_tokens must be a multiple of page_tokens"),
        ("- a\n- b", "is not a mapping of settings"),
        ("a: [", "is not YAML"),
        (b"model: \xff", "is not UTF-8 text (byte 7)"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        load_config(written(tmp_path, text), {})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_empty_file_is_all_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISTHMUS_JOBS_DB")
    monkeypatch.delenv("ISTHMUS_TLS")
    config = load_config(written(tmp_path, ""), {})
    assert config == ClusterConfig(cluster_id=config.cluster_id)
    assert config.cluster_id != ClusterConfig().cluster_id, "drawn for each"


def test_worker_settings_from_file_and_flags(tmp_path: Path) -> None:
    path = written(tmp_path, "decode_worker: {max_batch: 4}\nthreads: 3\n")
    config = load_config(path, {"decode_worker": {"listen": "h:1"}})
    settings = config.process_settings("decode", default_threads=2)
    assert (settings["max_batch"], settings["threads"], settings["listen"]) == (4, 3, "h:1")
    with pytest.raises(InvalidRequest, match="unknown key 'port'"):
        load_config(None, {"decode_worker": {"port": 1}})


def test_where_http_is_answered(tmp_path: Path) -> None:
    """A flag wins over the settings; what they have not, `isthmus up` has by default, a free port beside a free one."""
    here = "gateway: {http_listen: '10.0.0.1:8080', http: {tls: off}}"
    for text, flags, port, by_default, none, expected in (
        ("", {}, None, False, False, None),
        ("", {}, None, True, False, "127.0.0.1:8000"),
        ("", {"port": 0}, None, True, False, "127.0.0.1:0"),
        ("host: '::1'", {}, 0, False, False, "[::1]:0"),
        (here, {}, None, True, False, "10.0.0.1:8080"),
        (here, {}, 9000, True, False, "127.0.0.1:9000"),
        (here, {}, 9000, True, True, None),
        ("gateway: {http_listen: none}", {}, None, True, False, None),
        ("gateway: {http_listen: null, replays: 1}", {}, None, True, False, None),
    ):
        settings = load_config(written(tmp_path, text), flags).with_http(port, none=none, by_default=by_default)
        assert settings.gateway.http_listen == expected, (text, flags, port)
    assert load_config(written(tmp_path, here), {}).gateway.http.tls == "off"
    for wrong, words in (("http_listen: 8000", "http_listen"), ("http: {cors_origins: [x.example]}", "is no origin")):
        with pytest.raises(InvalidRequest, match=words):
            load_config(written(tmp_path, f"gateway: {{{wrong}}}"), {})
