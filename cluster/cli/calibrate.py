"""`isthmus calibrate`. Workers calibrate by themselves when they first load a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .terminal.flags import Flag, command_with, field_of, given

PAGE_TOKENS = "prefill_worker.page_tokens"


def calibrate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A name of `isthmus models`, a folder, a GGUF file or a hub id.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: the one that isthmus ships.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="At most so many of the text.")] = 4096,
    out: Annotated[Path | None, typer.Option(help="File to write; default: where workers of this host look.")] = None,
) -> None:
    """Measure which key channels a model's queries care about, and keep that for the tq- codecs.

    Workers do this by themselves when they first load a model. Workers that run keep what they have: restart all of
    them afterwards, since workers whose parameters differ are never paired. For a cluster over several hosts write one
    file, copy it to all of them, and name it in the settings: `balance: FILE`.

    [bold]Examples[/]

      isthmus calibrate smollm2-135m

      isthmus calibrate ./my-model --text dialogues.txt --tokens 8192

      isthmus calibrate smollm2-135m --out /mnt/shared/balance.safetensors
    """
    from rich.console import Console
    from rich.progress import Progress

    page_tokens = given(ctx).get("prefill_worker", {}).get("page_tokens", field_of(PAGE_TOKENS).default)
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task(f"calibrating {model}", total=None)
        path = calibrate_model(
            model, text, tokens, page_tokens, out, lambda done, of: progress.update(task, completed=done, total=of)
        )
    print(path)


CalibrateCommand = command_with((Flag(PAGE_TOKENS),))


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
    from ...proto.errors import InvalidRequest

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
    from ...proto.errors import InvalidRequest

    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InvalidRequest(f"{file} is not UTF-8 text") from None
