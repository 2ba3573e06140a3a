"""models."""

from __future__ import annotations

import click

from whet.cli.app import Settings, settings_options

_MODEL_COLUMNS = (
    "name", "state", "task", "model_type", "quantization", "dtype", "num_parameters", "max_model_len", "device",
)  # fmt: skip


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
