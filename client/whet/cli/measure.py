"""quantize, perplexity, embed."""

from __future__ import annotations

from typing import Any

import click

from whet import QuantizeReport
from whet.cli.app import Settings, given, pick_model, progress_bar, read_text, settings_options


@click.command()
@click.option("--model", "-m", default=None, help="Default: the only one that is loaded.")
@click.option("--scheme", type=click.Choice(["q8", "q4"]), required=True)
@click.option("--output", "-o", required=True, help="Name of the new model.")
@click.option("--group-size", type=int, default=None, help="q4: 32, 64 or 128.")
@click.option("--symmetric/--asymmetric", default=None, help="q4: without or with zero points.")
@click.option("--quantize-embeddings", is_flag=True, default=None)
@click.option("--quantize-head", is_flag=True, default=None)
@click.option("--eval-file", type=click.Path(allow_dash=True), help="Measure perplexity and logit KL on this text.")
@click.option("--dry-run", is_flag=True, default=None, help="Write nothing.")
@click.option("--load/--no-load", default=None, help="Load the new model.")
@settings_options
@click.pass_obj
def quantize(
    settings: Settings, /, model: str | None, scheme: str, output: str, eval_file: str | None, **options: Any
) -> None:
    """Write a quantized copy of a model."""
    if eval_file is not None:
        options["eval_text"] = read_text(None, eval_file)
    with settings.client() as client, progress_bar(settings) as bar:
        name = pick_model(client, model, "generate")
        task = bar.add_task("quantizing", total=None)
        with client.quantize(model=name, scheme=scheme, output=output, **given(options)) as job:
            for progress in job:
                settings.emit("progress", progress)
                bar.update(
                    task,
                    description=progress.stage,
                    completed=progress.tensors_done,
                    total=progress.tensors_total or None,
                )
            report = job.report
    settings.emit("report", report, lambda: print(_describe(report)))


def _describe(report: QuantizeReport) -> str:
    size = f"{report.bytes_in} bytes in"
    if report.bytes_out is not None:
        size += f", {report.bytes_out} bytes out"
    if report.ratio is not None:
        size += f", ratio {report.ratio:.3f}"
    lines = [
        f"{report.output}: {size}" if report.output else f"dry run: {size}",
        f"{report.num_quantized} tensors quantized, {report.num_kept} kept, {report.seconds:.1f} s",
    ]
    if report.tensors:
        worst = max(report.tensors, key=lambda tensor: tensor.relative_rmse)
        lines.append(f"largest relative RMSE {worst.relative_rmse:.4g} ({worst.name})")
    if report.perplexity_before is not None and report.perplexity_after is not None:
        lines.append(f"perplexity {report.perplexity_before:.4f} before, {report.perplexity_after:.4f} after")
    if report.logit_kl is not None:
        lines.append(f"logit KL {report.logit_kl:.4g} nats over {report.num_eval_tokens} tokens")
    return "\n".join(lines)


@click.command()
@click.argument("text", required=False)
@click.option("--file", "-f", type=click.Path(allow_dash=True), help="Read the text from this file.")
@click.option("--model", "-m", default=None, help="Default: the only one that is loaded.")
@click.option("--adapter", "-a", default=None)
@click.option("--adapter-version", type=int, default=None)
@click.option("--window", type=int, default=None, help="Tokens of one forward.")
@click.option("--stride", type=int, default=None, help="Tokens by which the window moves.")
@click.option("--max-tokens", type=int, default=None, help="Score the first so many tokens alone.")
@settings_options
@click.pass_obj
def perplexity(settings: Settings, /, text: str | None, file: str | None, model: str | None, **options: Any) -> None:
    """Perplexity of TEXT under a model."""
    text = read_text(text, file)
    with settings.client() as client, progress_bar(settings) as bar:
        name = pick_model(client, model, "generate")
        task = bar.add_task("windows", total=None)
        result = client.perplexity(
            text,
            model=name,
            on_progress=lambda progress: bar.update(
                task, completed=progress.windows_done, total=progress.windows_total
            ),
            **given(options),
        )
    error = "" if result.standard_error is None else f" (standard error {result.standard_error:.4f})"
    settings.emit(
        "perplexity",
        result,
        lambda: print(
            f"perplexity {result.perplexity:.4f}, NLL {result.nll:.4f}{error} nats, "
            f"{result.num_tokens} tokens in {result.num_windows} windows, {result.seconds:.1f} s"
        ),
    )


@click.command()
@click.argument("texts", nargs=-1)
@click.option("--file", "-f", type=click.Path(allow_dash=True), help="One text a line of this file.")
@click.option("--model", "-m", default=None, help="Default: the only one that is loaded for embeddings.")
@click.option("--normalize/--no-normalize", default=None)
@click.option("--dimensions", type=int, default=None, help="Keep the first so many.")
@click.option("--pooling", type=click.Choice(["mean", "cls", "last"]), default=None)
@click.option("--input-type", type=click.Choice(["query", "document"]), default=None)
@click.option("--instruction", default=None, help="What the vectors of these queries are for.")
@settings_options
@click.pass_obj
def embed(settings: Settings, /, texts: tuple[str, ...], file: str | None, model: str | None, **options: Any) -> None:
    """Embed TEXTS; one vector a line."""
    if bool(texts) == (file is not None):
        raise click.UsageError("give texts or --file")
    inputs = list(texts) if texts else [line for line in read_text(None, file).split("\n") if line]
    with settings.client() as client:
        result = client.embed(inputs, model=pick_model(client, model, "embed"), **given(options))
    for text, vector in zip(inputs, result.vectors, strict=True):
        settings.emit(
            "embedding",
            {"text": text, "vector": vector},
            lambda vector=vector: print(*(f"{value:.7g}" for value in vector)),  # type: ignore[misc]
        )
