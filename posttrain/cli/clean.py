"""`posttrain clean`: remove what nobody needs any more from the outputs folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.store import Store


@dataclass(frozen=True)
class Leftover:
    """A folder that may go, why, and its size in bytes; `restore` marks one that goes back into place instead."""

    folder: Path
    why: str
    bytes: int
    restore: bool = False


def command(
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, only show it.")] = False,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN …]", help="Runs or sweeps to remove with all that only they use."),
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Also remove runs that were active last before that.")
    ] = None,
) -> None:
    """Remove abandoned work folders and artifacts that no run refers to, and runs if told so; never what is running."""
    from posttrain.pipeline.plan_text import size
    from posttrain.pipeline.run_dir import require_outputs

    require_outputs(outputs)
    ended = _ended_runs(outputs, runs or [], older_than)
    found = [*ended, *leftovers(outputs, without={one.folder for one in ended})]
    if not found:
        typer.echo("nothing to clean")
        return
    for one in found:
        typer.echo(f"{size(one.bytes):>10}  {one.folder.relative_to(outputs)}  {one.why}")
    total = size(sum(one.bytes for one in found if not one.restore))
    if not yes:
        days = [] if older_than is None else ["--older-than", f"{older_than:g}"]
        place = [] if outputs == Path("outputs") else ["--outputs", str(outputs)]
        typer.echo(
            f"{total} would be freed: {shlex.join(['posttrain', 'clean', *(runs or []), *days, *place, '--yes'])}"
        )
        return
    remove(found)
    typer.echo(f"{total} freed")


def _ended_runs(outputs: Path, names: list[str], days: float | None) -> list[Leftover]:
    """Folders of runs and sweeps that are to go.

    Raises:
        RecipeError: there is no such run, or it is running.
    """
    import time

    from posttrain.errors import RecipeError
    from posttrain.pipeline.lock import held
    from posttrain.pipeline.run_dir import find_run, last_activity, list_runs
    from posttrain.pipeline.sweep import find_sweep

    found: dict[Path, str] = {}
    chosen = []
    for name in names:
        sweep = find_sweep(name, outputs)
        if sweep is None:
            chosen.append(find_run(name, outputs))
            continue
        found[sweep[0]] = "sweep"
        inside = [point["run"] for point in sweep[1]["points"] if point["run"]]
        chosen += [run for run in list_runs(outputs) if run.name in inside]
    for run in chosen:
        if held(run.lock_path):
            raise RecipeError(f"run {run.name} is running", fix=run.typed("cancel"))
        found[run.path] = "run"
    if days is not None:
        for run in list_runs(outputs):
            idle = (time.time() - last_activity(run)) / 86400
            if idle >= days and not held(run.lock_path):
                found.setdefault(run.path, f"run, idle for {idle:.0f} days")
    return [_leftover(folder, why) for folder, why in found.items()]


def leftovers(outputs: Path, without: set[Path] = frozenset()) -> list[Leftover]:
    """What `clean` removes: work folders that no run can resume, and artifacts that no run refers to.

    Args:
        without: folders of runs that do not count any more.
    """
    from posttrain.pipeline.lock import held
    from posttrain.pipeline.run_dir import list_runs
    from posttrain.pipeline.store import Store

    store = Store(outputs / "store")
    kept = [run for run in list_runs(outputs) if run.path not in without]
    wanted = {(stage["type"], stage["key"]) for run in kept for stage in run.record()["stages"]}
    found = []
    for folder in store.work_dirs():
        identity = (folder.parent.name, folder.name.removeprefix(".work-"))
        if held(folder / "lock") or held(folder / "runner"):
            continue
        if store.folder(*identity).exists() and not store.aside(*identity).exists():
            found.append(_leftover(folder, "work folder of a finished artifact"))
        elif identity not in wanted:
            found.append(_leftover(folder, "abandoned work folder"))
    for folder in store.artifacts():
        identity = (folder.parent.name, folder.name)
        if identity not in wanted and not held(store.work_dir(*identity) / "lock") and not _adopted(folder, without):
            found.append(_leftover(folder, "no run refers to it"))
    stale = [
        _leftover(folder, "made from outputs that a forced rerun replaced")
        for folder in sorted(store.root.glob("*/.stale-*"))
    ]
    stale += [_leftover(folder, "damaged; it was made again") for folder in sorted(store.root.glob("*/.damaged-*"))]
    stale += [_leftover(folder, "was just being removed") for folder in sorted(store.root.glob("*/.gone-*"))]
    return found + stale + _set_aside(store, wanted)


def _adopted(folder: Path, without: set[Path]) -> bool:
    """Whether an artifact was made by hand and is waiting for its first run; one whose runs are removed goes too."""
    from posttrain.errors import RecipeError
    from posttrain.pipeline.store import read_artifact

    try:
        return "adopted" in read_artifact(folder).manifest and not without
    except RecipeError:
        return False


def _set_aside(store: Store, wanted: set[tuple[str, str]]) -> list[Leftover]:
    """Artifacts that a forced rerun had set aside and that died before it ended."""
    from posttrain.pipeline.lock import held

    found = []
    for folder in sorted(store.root.glob("*/.old-*")):
        identity = (folder.parent.name, folder.name.removeprefix(".old-"))
        work_dir = store.work_dir(*identity)
        if work_dir.exists() and (held(work_dir / "lock") or identity in wanted):
            continue
        replaced = store.folder(*identity).exists() or identity not in wanted
        why = "replaced by a forced rerun" if replaced else "set aside by a forced rerun that never ended: put back"
        found.append(_leftover(folder, why, restore=not replaced))
    return found


def _leftover(folder: Path, why: str, *, restore: bool = False) -> Leftover:
    from posttrain.pipeline.files import list_files

    return Leftover(folder, why, sum(path.lstat().st_size for path in list_files(folder).values()), restore)


def remove(found: list[Leftover]) -> None:
    """Remove (or put back) each of them; a work folder only while both its locks are ours."""
    import os

    from posttrain.pipeline.files import discard_tree, remove_tree
    from posttrain.pipeline.stage_runner import discard_work

    for one in found:
        if one.restore:
            os.rename(one.folder, one.folder.with_name(one.folder.name.removeprefix(".old-")))
        elif one.folder.name.startswith(".work-"):
            discard_work(one.folder)
        elif one.folder.parent.name in ("runs", "sweeps"):
            discard_tree(one.folder)
        else:
            # An artifact without its manifest is none: a crash in between leaves nothing that could be taken for one.
            (one.folder / "manifest.json").unlink(missing_ok=True)
            remove_tree(one.folder)
