"""The ``whet-server`` command: serves, with ``pull`` fetches a model from the Hugging Face hub, with ``verify`` checks
how one is computed.

Its options are the fields of ServerConfig: name, kind and help come from there.
"""

from __future__ import annotations

import gc
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
from pydantic.fields import FieldInfo

from engine.errors import EngineError
from server.config import ServerConfig, default_state_dir, load_config
from server.logs import configure_logging
from server.version import server_version

_REPEATABLE = {"model": "NAME=PATH", "adapter": "NAME=MODEL:PATH"}
_SIZES = frozenset(name for name in ServerConfig.model_fields if name.endswith("_bytes"))


def _option(name: str, field: FieldInfo) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The flag of one field. Values are checked by ServerConfig, so that all sources fail alike."""
    flag = f"--{name.replace('_', '-')}"
    text = field.description or ""
    if name in _REPEATABLE:
        return click.option(flag, name, multiple=True, metavar=_REPEATABLE[name], help=text)
    kind = field.annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if field.default_factory is None and field.default is not None:
        text += f" Default: {str(field.default).lower() if kind is bool else field.default}."
    if kind is bool:
        return click.option(f"{flag}/--no-{name.replace('_', '-')}", name, default=None, help=text)
    if typing.get_origin(kind) is Literal:
        metavar = "|".join(str(value) for value in typing.get_args(kind))
    elif name in _SIZES:
        metavar = "SIZE"
    elif kind in (int, float):
        metavar = "N"
    elif kind is Path:
        metavar = "PATH"
    else:
        metavar = "TEXT"
    return click.option(flag, name, metavar=metavar, help=text)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, field in reversed(ServerConfig.model_fields.items()):
        command = _option(name, field)(command)
    return command


def _version(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        click.echo(f"whet-server, version {server_version()}")
        context.exit()


@click.group(invoke_without_command=True, context_settings={"max_content_width": 120, "show_default": False})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version and exit."
)
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="YAML file of these options."
)
@_options
@click.pass_context
def main(context: click.Context, /, config_file: Path | None, **flags: Any) -> None:
    """Serves, trains, quantizes, evaluates and embeds with language models over gRPC.

    Every option may also be given as an environment variable (WHET_MAX_BATCH_TOKENS for --max-batch-tokens) or in the
    file that --config names; flags win over the environment, and the environment over the file.
    """
    if context.invoked_subcommand is not None:
        return
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    try:
        config = load_config(given, config_file)
    except EngineError as error:
        click.echo(f"whet-server: {error.message}", err=True)
        sys.exit(2)
    configure_logging(config.log_level, config.log_format)
    sys.exit(_serve(config))


def _serve(config: ServerConfig) -> int:
    gc.disable()  # what is imported stays; see server.workers.boot
    from server.app import serve

    gc.freeze()
    gc.enable()
    return serve(config)


@main.command()
@click.argument("repository", metavar="ORG/NAME")
@click.option("--revision", default=None, help="Branch, tag or commit. Default: the main branch.")
@click.option("--to", "directory", type=click.Path(path_type=Path), default=None, help="Where to put it.")
def pull(repository: str, revision: str | None, directory: Path | None) -> None:
    """Fetches a model from the Hugging Face hub: weights as safetensors, configuration and tokenizer, nothing else.

    Prints the directory, for --model NAME=PATH.
    """
    from server.pull import pull_model

    target = directory or default_state_dir() / "hub" / repository.replace("/", "--")
    try:
        click.echo(pull_model(repository, revision, target))
    except EngineError as error:
        click.echo(f"whet-server: {error.message}", err=True)
        sys.exit(1)


@main.command()
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--layers", type=int, default=None, metavar="N", help="Take the first N layers alone. Default: all.")
@click.option("--tokens", type=int, default=192, metavar="N", help="To run the model on. Default: 192.")
@click.option("--adapter-rank", type=int, default=4, metavar="N", help="Of the adapters of (b) and (d). Default: 4.")
@click.option("--num-threads", type=int, default=0, metavar="N", help="Of torch. Default: as many as cores.")
@click.option("--seed", type=int, default=0, metavar="N", help="Of adapters, cuts and random tokens. Default: 0.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output in place of the table.")
def verify(
    model: Path, layers: int | None, tokens: int, adapter_rank: int, num_threads: int, seed: int, as_json: bool
) -> None:
    """Checks how the model at MODEL is computed: a Hugging Face directory, a .safetensors or a .gguf file.

    \b
    (a) logits and every layer's output equal those of transformers
    (b) training, scoring, chunked prefill and stepwise decoding give the same numbers
    (c) gradients of one layer of each kind, and of every autograd.Function, equal differences in float64
    (d) gradients of every A and B of an adapter equal those of transformers and peft

    (a) and (d) need transformers and peft, and a model that they read; what cannot be run is reported as skipped, with
    the reason, and never as passed. Everything runs on the CPU in float32: the model takes 4 bytes a parameter, twice
    that with transformers' copy, and one layer in float64. A model that does not fit is refused with the number of
    layers that would; --layers N verifies the first N layers with embeddings and head, and takes less time as well.

    Exit status: 0 if nothing failed, 1 if anything did, 2 if the model cannot be read or does not fit.
    """
    from server.verify import verify_model

    try:
        passed = verify_model(
            model,
            num_layers=layers,
            num_tokens=tokens,
            rank=adapter_rank,
            num_threads=num_threads,
            seed=seed,
            as_json=as_json,
        )
    except EngineError as error:
        click.echo(f"whet-server: {error.message}", err=True)
        sys.exit(2)
    sys.exit(0 if passed else 1)
