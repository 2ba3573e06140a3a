"""adapters."""

from __future__ import annotations

import dataclasses
import datetime

import click

from whet import AdapterInfo, MergeReport, WeightedAdapter
from whet.cli.app import Settings, progress_bar, settings_options, shown, split_version

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
@click.option("--force", is_flag=True, help="Also one that was trained on other base weights.")
@settings_options
@click.pass_obj
def load_adapter(settings: Settings, name: str, model: str, version: int | None, force: bool) -> None:
    """Bring a version into memory and make it live."""
    with settings.client() as client:
        loaded = client.load_adapter(name, model=model, version=version, force=force)
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


@adapters.command("rename")
@click.argument("name")
@click.argument("new_name")
@click.option("--model", "-m", required=True)
@settings_options
@click.pass_obj
def rename_adapter(settings: Settings, name: str, new_name: str, model: str) -> None:
    """Give an adapter another name. Its versions keep their numbers."""
    with settings.client() as client:
        settings.emit_table("adapter", client.rename_adapter(name, new_name, model=model), _COLUMNS)


@adapters.command("revert")
@click.argument("name")
@click.option("--model", "-m", required=True)
@click.option("--version", type=int, default=None, help="Default: the one that the live version went on from.")
@settings_options
@click.pass_obj
def revert_adapter(settings: Settings, name: str, model: str, version: int | None) -> None:
    """Make an earlier version live again."""
    with settings.client() as client:
        settings.emit_table("adapter", [client.revert_adapter(name, model=model, version=version)], _COLUMNS)


@adapters.command("prune")
@click.argument("name", required=False)
@click.option("--model", "-m", required=True)
@click.option("--keep-last", type=int, required=True, help="Newest versions to keep, besides the live one.")
@click.option("--dry-run", is_flag=True, help="Tell what would be deleted.")
@settings_options
@click.pass_obj
def prune_adapters(settings: Settings, name: str | None, model: str, keep_last: int, dry_run: bool) -> None:
    """Delete old versions of an adapter, or of all, that nothing needs."""
    with settings.client() as client:
        pruned = client.prune_adapters(name, model=model, keep_last=keep_last, dry_run=dry_run)
        settings.emit_table("adapter", pruned, _COLUMNS)


@adapters.command("combine")
@click.argument("name")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE[:VERSION][=WEIGHT]...")
@click.option("--model", "-m", required=True)
@click.option("--method", type=click.Choice(["cat", "linear"]), default=None, help="Default: cat, which is exact.")
@click.option("--force", is_flag=True, help="Also adapters that were trained on other base weights.")
@settings_options
@click.pass_obj
def combine_adapters(
    settings: Settings, name: str, sources: tuple[str, ...], model: str, method: str | None, force: bool
) -> None:
    """Make a new version of NAME from several adapters: tone=0.7 style:3=0.3"""
    with settings.client() as client:
        weighted = [parse_source(source) for source in sources]
        combined = client.combine_adapters(name, weighted, model=model, method=method, force=force)
        settings.emit_table("adapter", [combined], _COLUMNS)


@adapters.command("merge")
@click.argument("sources", nargs=-1, required=True, metavar="NAME[:VERSION][=WEIGHT]...")
@click.option("--model", "-m", required=True)
@click.option("--output", "-o", required=True, help="Name of the new model.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default=None, help="Default: the source's."
)
@click.option("--force", is_flag=True, help="Also adapters that were trained on other base weights.")
@click.option("--load/--no-load", default=None, help="Load the new model.")
@settings_options
@click.pass_obj
def merge_adapter(
    settings: Settings,
    sources: tuple[str, ...],
    model: str,
    output: str,
    dtype: str | None,
    force: bool,
    load: bool | None,
) -> None:
    """Write a model of its own with adapters merged into its weights."""
    weighted = [parse_source(source) for source in sources]
    with settings.client() as client, progress_bar(settings) as bar:
        task = bar.add_task("merging", total=None)
        with client.merge_adapter(weighted, model=model, output=output, dtype=dtype, force=force, load=load) as job:
            for progress in job:
                settings.emit("progress", progress)
                bar.update(task, completed=progress.tensors_done, total=progress.tensors_total)
            report = job.report
    settings.emit("report", report, lambda: print(_describe_merge(report)))


def _describe_merge(report: MergeReport) -> str:
    loaded = ", loaded" if report.loaded else ""
    return (
        f"{report.output}: {' + '.join(map(str, report.adapters))}; {report.num_merged} tensors merged in "
        f"{report.dtype}, {report.num_kept} kept, {report.bytes_out / 1e6:.1f} MB, relative change "
        f"{report.relative_change:.3g}, {report.seconds:.1f} s{loaded}"
    )


def parse_source(text: str) -> WeightedAdapter:
    """Reads NAME[:VERSION][=WEIGHT].

    Raises:
        click.UsageError: the version is no number, or the weight none.
    """
    adapter, equals, weight = text.partition("=")
    try:
        name, version = split_version(adapter)
        return WeightedAdapter(name=name, version=version, weight=float(weight) if equals else 1.0)
    except ValueError:
        raise click.UsageError(f"{text!r} is no NAME[:VERSION][=WEIGHT]") from None


@adapters.command("import")
@click.argument("name")
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option("--model", "-m", required=True)
@click.option("--force", is_flag=True, help="Also one that was trained on other base weights.")
@settings_options
@click.pass_obj
def import_adapter(settings: Settings, name: str, directory: str, model: str, force: bool) -> None:
    """Upload a PEFT adapter from DIRECTORY."""
    with settings.client() as client:
        imported = client.import_adapter(name, model=model, directory=directory, force=force)
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
