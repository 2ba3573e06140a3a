"""models and adapters."""

from __future__ import annotations

import click

from whet.cli.app import Settings, settings_options

_MODEL_COLUMNS = (
    "name", "state", "task", "model_type", "quantization", "dtype", "num_parameters", "max_model_len", "device",
)  # fmt: skip
_ADAPTER_COLUMNS = ("model", "name", "version", "live", "loaded", "rank", "alpha", "best_nll", "created_at")


@click.group(invoke_without_command=True)
@settings_options
@click.pass_context
def models(context: click.Context) -> None:
    """Models that the server knows. Lists them, unless told otherwise."""
    if context.invoked_subcommand is None:
        context.invoke(list_models)


@models.command("list")
@settings_options
@click.pass_obj
def list_models(settings: Settings) -> None:
    """List models."""
    with settings.client() as client:
        settings.emit_table("model", client.models(), _MODEL_COLUMNS)


@models.command("show")
@click.argument("name")
@settings_options
@click.pass_obj
def show_model(settings: Settings, name: str) -> None:
    """Describe a model."""
    with settings.client() as client:
        settings.emit_table("model", [client.model(name)], _MODEL_COLUMNS)


@models.command("load")
@click.argument("name")
@settings_options
@click.pass_obj
def load_model(settings: Settings, name: str) -> None:
    """Load a model."""
    with settings.client() as client:
        settings.emit_table("model", [client.load_model(name)], _MODEL_COLUMNS)


@models.command("unload")
@click.argument("name")
@click.option("--force", is_flag=True, help="Abort what uses it.")
@settings_options
@click.pass_obj
def unload_model(settings: Settings, name: str, force: bool) -> None:
    """Free a model's memory."""
    with settings.client() as client:
        settings.emit_table("model", [client.unload_model(name, force=force)], _MODEL_COLUMNS)


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
        settings.emit_table("adapter", client.adapters(model=model, name=name, live_only=live), _ADAPTER_COLUMNS)


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
        settings.emit_table("adapter", [loaded], _ADAPTER_COLUMNS)


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
        settings.emit_table("adapter", unloaded, _ADAPTER_COLUMNS)


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
        settings.emit_table("adapter", deleted, _ADAPTER_COLUMNS)


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
        settings.emit_table("adapter", [imported], _ADAPTER_COLUMNS)


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
        settings.emit_table("adapter", [exported], _ADAPTER_COLUMNS)
