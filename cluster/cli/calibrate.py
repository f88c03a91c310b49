"""`isthmus calibrate`."""

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    model: Annotated[str, typer.Argument(help="A name of `isthmus models`, a folder, a GGUF file or a hub id.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: the one that isthmus ships.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="At most so many of the text.")] = 4096,
    page_tokens: Annotated[int, typer.Option(min=8, max=1024, help="Page size of the workers.")] = 64,
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

    from .calibration import calibrate_model

    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task(f"calibrating {model}", total=None)
        path = calibrate_model(
            model, text, tokens, page_tokens, out, lambda done, of: progress.update(task, completed=done, total=of)
        )
    print(path)
