"""adapters."""

from __future__ import annotations

import dataclasses
import datetime

import click

from whet import AdapterInfo
from whet.cli.app import Settings, settings_options, shown

_COLUMNS = ("model", "name", "version", "live", "loaded", "rank", "alpha", "best_nll", "created_at")


@click.group(invoke_without_command=True)
@settings_options
@click.pass_context
def adapters(context: click.Context) -> None:
    """LoRA adapters. Lists them, unless told otherwise."""
    if context.invoked_subcommand is None:
        context.invoke(list_adapters)


@adapters.command("list")
@click.option("--model", "-m", default=None)
@click.option("--name", default=None)
@click.option("--live", is_flag=True, help="Live versions alone.")
@settings_options
@click.pass_obj
def list_adapters(settings: Settings, model: str | None, name: str | None, live: bool) -> None:
    """List adapters, every version of each."""
    with settings.client() as client:
        settings.emit_table("adapter", client.adapters(model=model, name=name, live_only=live), _COLUMNS)


@adapters.command("show")
@click.argument("name")
@click.option("--model", "-m", required=True)
@click.option("--version", type=int, default=None, help="Default: the live one.")
@settings_options
@click.pass_obj
def show_adapter(settings: Settings, name: str, model: str, version: int | None) -> None:
    """Describe a version, its origin included."""
    with settings.client() as client:
        found = client.adapter(name, model=model, version=version)
    settings.emit("adapter", found, lambda: _print_fields(found))


def _print_fields(adapter: AdapterInfo) -> None:
    values = {field.name: shown(getattr(adapter, field.name)) for field in dataclasses.fields(adapter)}
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value or '-'}")


@dataclasses.dataclass
class _Origin:
    """A line of a lineage."""

    name: str
    version: int | None
    origin: str
    run_id: str
    data: str
    base: str
    created_at: datetime.datetime | None
    forced: bool | None


def _origin(adapter: AdapterInfo) -> _Origin:
    came_from = [*([adapter.parent] if adapter.parent else []), *adapter.sources]
    how = f"{adapter.combination_method} of " if adapter.combination_method else ""
    return _Origin(
        name=adapter.name,
        version=adapter.version,
        origin=how + " + ".join(map(str, came_from)) or "base",
        run_id=adapter.run_id or "-",
        data=adapter.data_digest[:12] or "-",
        base=adapter.base_digest[:12] or "-",
        created_at=adapter.created_at,
        forced=adapter.forced,
    )


@adapters.command("lineage")
@click.argument("name")
@click.option("--model", "-m", required=True)
@click.option("--version", type=int, default=None, help="Default: the live one.")
@settings_options
@click.pass_obj
def show_lineage(settings: Settings, name: str, model: str, version: int | None) -> None:
    """Show what a version came from, the base model first."""
    with settings.client() as client:
        base = client.model(model)
        chain = client.adapter_lineage(name, model=model, version=version)
    if settings.json:
        settings.emit("model", base)
        settings.emit_table("adapter", chain, ())
        return
    digest = (base.weights_digest or "")[:12] or "-"
    first = _Origin(base.name, None, "-", "-", "-", digest, None, None)
    columns = [field.name for field in dataclasses.fields(_Origin)]
    settings.emit_table("adapter", [first, *map(_origin, chain)], columns)


@adapters.command("load")
@click.argument("name")
@click.option("--model", "-m", required=True)
@click.option("--version", type=int, default=None, help="Default: the newest.")
@settings_options
@click.pass_obj
def load_adapter(settings: Settings, name: str, model: str, version: int | None) -> None:
    """Bring a version into memory and make it live."""
    with settings.client() as client:
        loaded = client.load_adapter(name, model=model, version=version)
        settings.emit_table("adapter", [loaded], _COLUMNS)


@adapters.command("unload")
@click.argument("name")
@click.option("--model", "-m", required=True)
@click.option("--version", type=int, default=None, help="Default: all.")
@settings_options
@click.pass_obj
def unload_adapter(settings: Settings, name: str, model: str, version: int | None) -> None:
    """Free an adapter's memory."""
    with settings.client() as client:
        unloaded = client.unload_adapter(name, model=model, version=version)
        settings.emit_table("adapter", unloaded, _COLUMNS)


@adapters.command("delete")
@click.argument("name")
@click.option("--model", "-m", required=True)
@click.option("--version", type=int, default=None, help="Default: all.")
@settings_options
@click.pass_obj
def delete_adapter(settings: Settings, name: str, model: str, version: int | None) -> None:
    """Remove an adapter from memory and disk."""
    with settings.client() as client:
        deleted = client.delete_adapter(name, model=model, version=version)
        settings.emit_table("adapter", deleted, _COLUMNS)


@adapters.command("import")
@click.argument("name")
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option("--model", "-m", required=True)
@settings_options
@click.pass_obj
def import_adapter(settings: Settings, name: str, directory: str, model: str) -> None:
    """Upload a PEFT adapter from DIRECTORY."""
    with settings.client() as client:
        imported = client.import_adapter(name, model=model, directory=directory)
        settings.emit_table("adapter", [imported], _COLUMNS)


@adapters.command("export")
@click.argument("name")
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--model", "-m", required=True)
@click.option("--version", type=int, default=None, help="Default: the live one.")
@click.option("--overwrite", is_flag=True, help="Replace what DIRECTORY holds.")
@settings_options
@click.pass_obj
def export_adapter(
    settings: Settings, name: str, directory: str, model: str, version: int | None, overwrite: bool
) -> None:
    """Download an adapter into DIRECTORY, in PEFT's format."""
    with settings.client() as client:
        exported = client.export_adapter(name, model=model, directory=directory, version=version, overwrite=overwrite)
        settings.emit_table("adapter", [exported], _COLUMNS)
