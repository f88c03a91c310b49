"""`isthmus store`: whose pages lie in the page store, and how a tenant's are erased."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..terminal import options as opt
from ..terminal.flags import Flag, command_with, given

if TYPE_CHECKING:
    from ....kvtransfer.storage.sealed import SealedPlaces

store_app = typer.Typer(
    no_args_is_help=True, help="Show whose pages lie in the page store; erase a tenant's.", rich_markup_mode="rich"
)
_Store = command_with((Flag("store_dir"), Flag("store_key_file")))


@store_app.command("ls", cls=_Store)
def store_ls(ctx: typer.Context, config: opt.ConfigFile = None, as_json: opt.Json = False) -> None:
    """List the tenants with pages in the store. The names of encrypted ones need the key file.

    [bold]Examples[/]

      isthmus store ls --store-dir /var/lib/isthmus/pages

      isthmus store ls --config cluster.yaml --json
    """
    from ....kvtransfer.storage.tenants import list_tenants

    folder, sealed = _opened(config, given(ctx))
    found = list_tenants(folder, sealed)
    if as_json:
        print(json.dumps([vars(tenant) for tenant in found]))
        return
    from ..terminal.columns import print_lines, table_lines

    rows = [
        (
            repr(tenant.tenant) if tenant.tenant is not None else tenant.folder,
            "yes" if tenant.sealed else "no",
            str(tenant.pages),
            f"{tenant.nbytes / 1e6:.1f}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(tenant.used_s)) if tenant.pages else "-",
        )
        for tenant in found
    ]
    print_lines(table_lines(("tenant", "encrypted", "pages", "MB", "last used"), rows))


@store_app.command("forget", cls=_Store)
def store_forget(
    ctx: typer.Context,
    tenant: Annotated[str, typer.Option(help='Whose pages; "" is the default tenant.')],
    config: opt.ConfigFile = None,
    as_json: opt.Json = False,
) -> None:
    """Erase a tenant's pages: first its key, without which no copy of them can be read, then the files.

    Workers that run notice. What they have in memory stays until it is evicted, or they end.

    [bold]Examples[/]

      isthmus store forget --tenant research --store-dir /var/lib/isthmus/pages --store-key-file store.key

      isthmus store forget --tenant research --config cluster.yaml
    """
    from ....kvtransfer.storage.sealed import SEALED
    from ....kvtransfer.storage.tenants import forget_tenant, list_tenants
    from ....proto.errors import InvalidRequest

    folder, sealed = _opened(config, given(ctx))
    if sealed is None and any(path.name.startswith(SEALED) for path in folder.iterdir()):
        raise InvalidRequest(
            f"{folder} has encrypted pages, whose tenants only the key tells: name it, --store-key-file"
        )
    if sealed is not None and any(each.sealed and each.tenant is None for each in list_tenants(folder, sealed)):
        raise InvalidRequest(f"{folder} has encrypted pages that this key does not open: is it the key of this store?")
    pages = forget_tenant(folder, tenant, sealed)
    print(json.dumps({"tenant": tenant, "pages": pages}) if as_json else f"{pages} pages of tenant {tenant!r} erased")


def _opened(file: Path | None, flags: Mapping[str, Any]) -> "tuple[Path, SealedPlaces | None]":
    """The folder of the settings, and what reads the encrypted names in it."""
    from ....kvtransfer.storage.private import read_secret
    from ....kvtransfer.storage.sealed import SealedPlaces
    from ....proto.errors import InvalidRequest, NotFound
    from ...config import load_config

    settings = load_config(file, flags).process_settings("prefill", default_threads=1)
    if not (store_dir := settings.get("store_dir")):
        raise InvalidRequest("no store: name its folder, --store-dir or store_dir in the settings")
    folder = Path(store_dir)
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}")
    key_file = settings.get("store_key_file")
    return folder, SealedPlaces(folder, read_secret(Path(key_file).expanduser())) if key_file else None
