"""Calibration of a model's balance on demand: `isthmus calibrate`. Workers calibrate by themselves at first load."""

from collections.abc import Callable
from pathlib import Path

from ...proto.errors import InvalidRequest


def calibrate_model(
    source: str,
    text_file: Path | None,
    tokens: int,
    page_tokens: int,
    out: Path | None,
    progress: Callable[[int, int], None],
) -> Path:
    """Calibrates a model and returns the file with its balance, which replaces the one that was there.

    `text_file`: UTF-8; None: the text that the project ships. `tokens`: at most so many of it. `out`: where to write;
    None: where workers look. `progress(done, of)`.
    InvalidRequest for a file that cannot be read or a text that is too short, NotFound for no such model.
    """
    from ...kvtransfer.calibration.balance import balance_path, calibrate, save_balance
    from ...kvtransfer.calibration.text import TEXT
    from ...model.cache import cache_root
    from ...model.load.loader import load_model
    from ...model.text.tokenizer import Tokenizer

    if tokens < 2 * page_tokens:
        raise InvalidRequest(f"{tokens} tokens to calibrate with; at least {2 * page_tokens} are needed")
    text = TEXT if text_file is None else _read(text_file)
    model = load_model(source)
    ids = Tokenizer(model.path).encode(text)[:tokens]
    balance = calibrate(model.forward, ids, model.layers, page_tokens, progress)
    path = out or balance_path(cache_root(), model.fingerprint, page_tokens)
    path.unlink(missing_ok=True)
    save_balance(path, model.fingerprint, balance)
    return path


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InvalidRequest(f"{file} is not UTF-8 text") from None
