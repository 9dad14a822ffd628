"""The command ``export-features``, and what ``predict --layout`` shares with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backend.cli_parts import StageBar, console, errors, quiet_log
from backend.errors import ResultDamaged
from backend.settings import load_settings

if TYPE_CHECKING:
    from backend.commands.export_features import Exported, Source

_READ_BY = {
    "clam": "CLAM: --data_h5_dir {out}, --feat_dir {out}/features_…",
    "trident": "TRIDENT: --job_dir {out}",
}


def add_commands(app: typer.Typer) -> None:
    """Make this module's command part of ``app``."""
    app.command("export-features")(export_features)


def export_features(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files.", show_default=False)],
    layout: Annotated[str, typer.Option("--layout", "-l", help="clam or trident.", show_default=False)],
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="result.h5 files, or folders that `predict` wrote, searched for them.", show_default=False),
    ] = None,
    project: Annotated[
        str,
        typer.Option(
            "--project",
            "-p",
            help="The analysed slides of a Label Studio project (number or title).",
            show_default=False,
        ),
    ] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Every stored result (RESULTS_URL) of the model in use (MODEL).")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are there with another content.")
    ] = False,
) -> None:
    """Write stored features, attention and slide embeddings as the files that CLAM or TRIDENT read. Nothing is
    computed.

    Say where the results are: files or folders, `--project`, or `--all`.

    `--layout clam` writes `patches/*.h5` (for `Whole_Slide_Bag_FP`), `features_MODEL/h5_files/*.h5` and
    `features_MODEL/pt_files/*.pt`. `--layout trident` writes a job folder: `20x_224px_0px_overlap` with `patches`,
    `features_MODEL` and `slide_features_MODEL`.

    Features are float32. Coordinates are those of level 0, also where a slide states its scanned area. The files of
    features hold `attention` (tiles, heads), `attention_scores` (their mean) and `slide_embedding` as well. Files are
    named by their slides; slides that share a name get a suffix that stays the same. A bag of patches has no
    coordinates: its features are written without.
    """
    from backend.commands.export_features import results_in, results_of_store
    from backend.results.features import layout_named

    layout_named(layout)
    if bool(results) + bool(project) + everything != 1:
        raise typer.BadParameter("give files or folders of results, or --project, or --all")
    with ExitStack() as stack:
        bar = stack.enter_context(StageBar())
        fingerprint = ""
        if results:
            sources = results_in(results)
        else:
            from backend.label_studio.services import Services

            settings = load_settings()
            quiet_log(settings, "export-features")
            services = stack.enter_context(closing(Services(settings)))
            if project:
                from backend.commands.project_features import results_of_project

                sources, unanalysed = results_of_project(services, project, bar.stage)
                if unanalysed:
                    errors.print(f"{unanalysed} tasks without a result are left out", highlight=False)
            else:
                sources, fingerprint = results_of_store(services.store), services.model.fingerprint
        done = _write(sources, out, layout, fingerprint, overwrite, bar)
    if not _told(done, out, layout):
        raise typer.Exit(1)


def features_of_folders(folders: Sequence[Path], out: Path, layout: str) -> bool:
    """Export what ``predict`` has just written to ``folders`` (which are searched); whether all of it could be."""
    from backend.commands.export_features import results_in

    if not folders:
        return True
    with StageBar() as bar:
        done = _write(results_in(folders), out, layout, "", False, bar)
    return _told(done, out, layout)


def _write(
    sources: Sequence[Source], out: Path, layout: str, fingerprint: str, overwrite: bool, bar: StageBar
) -> list[Exported]:
    from backend.commands.export_features import export_features as write

    return write(sources, out, layout, fingerprint=fingerprint, overwrite=overwrite, progress=bar.stage)


def _told(done: Sequence[Exported], out: Path, layout: str) -> bool:
    """Print what became of each result; whether none failed."""
    for one in done:
        if one.error is not None:
            of_predict = isinstance(one.error, ResultDamaged) and Path(one.source.place).is_file()
            hint = ". Delete it, and run `predict` again." if of_predict else ""
            errors.print(f"{one.source.place}: {one.error}{hint}", style="red", markup=False, highlight=False)
        elif one.passed_over:
            errors.print(f"{one.name} ({one.source.place}): {one.passed_over}", markup=False, highlight=False)
        elif not one.placed:
            errors.print(f"{one.name}: a bag of patches, written without coordinates", markup=False, highlight=False)
    exported = [one for one in done if one.files]
    written = sum(one.written for one in exported)
    there = sum(len(one.files) for one in exported) - written
    console.print(
        f"{len(exported)} slides in {out} ({written} files written, {there} were there already)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if exported:
        console.print(_READ_BY[layout].format(out=out), highlight=False, markup=False, soft_wrap=True)
    return not any(one.error for one in done)
