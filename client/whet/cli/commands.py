"""The command group."""

from __future__ import annotations

import click

import whet
from whet.cli.adapt import adapt
from whet.cli.adapters import adapters
from whet.cli.app import run, settings_options
from whet.cli.generate import chat, compare, generate, tokenize
from whet.cli.manage import models
from whet.cli.measure import embed, perplexity, quantize
from whet.cli.train import runs, train


@click.group()
@settings_options
@click.version_option(whet.__version__, prog_name="whet")
def cli() -> None:
    """Use a Whet server."""


for command in (
    chat, generate, compare, train, adapt, quantize, perplexity, embed, models, adapters, runs, tokenize,
):  # fmt: skip
    cli.add_command(command)

__all__ = ["cli", "run"]
