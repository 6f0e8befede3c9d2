"""Selects the units that must run, from manifests and files alone."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.run.owned import check_unlinked, remove_file
from pipeline.state.manifest import read_manifest
from stages.contracts.units import Unit, failure_in
from stages.io.files import TEMPORARY_PREFIX
from stages.io.storage import is_remote, remove_tree


def select(units: Sequence[Unit], verify: bool) -> list[Unit]:
    """The units that must run, in order: unsealed units, units that were sealed with a failure, and the units that make
    transient files which those need but lack.

    A unit that makes only transient files is skipped, sealed or not, if no selected unit lacks them. verify: compare digests
    too, not only sizes.
    """
    must_run: set[str] = set()
    lacking: set[str] = set()
    for unit in reversed(units):
        manifest = read_manifest(unit)
        if unit.writes:
            runs = any(
                path in lacking and not (manifest is not None and manifest.has_transient(unit, path, verify))
                for path in unit.writes
            )
        else:
            runs = manifest is None or failure_in(manifest.facts) is not None or not manifest.is_whole(unit, verify)
        if runs:
            must_run.add(unit.id)
            lacking.update(unit.reads)
    return [unit for unit in units if unit.id in must_run]


def leftovers(units: Sequence[Unit], selected: Sequence[Unit]) -> set[str]:
    """Transient files that no unit will read again. A crash between a seal and the deletion may have left them."""
    chosen = {unit.id for unit in selected}
    wanted = {path for unit in selected for path in (*unit.reads, *unit.writes)}
    return {path for unit in units if unit.id not in chosen for path in unit.reads} - wanted


def delete(run_dir: Path, paths: Iterable[str]) -> None:
    """Delete transient files of a run. Raises InputError for a file behind a symbolic link."""
    for path in paths:
        remove_file(run_dir, path)


def sweep(run_dir: Path, stage_dirs: Iterable[str], folders: Sequence[str] = ()) -> None:
    """Delete temporary files that killed workers have left in the directories of stages. folders: also delete the subfolders
    with these names.

    Raises InputError for a stage directory that is a symbolic link.
    """
    for stage_dir in stage_dirs:
        check_unlinked(run_dir, run_dir / stage_dir)
        for folder in folders:
            remove_tree(run_dir / stage_dir / folder)
        if is_remote(run_dir):
            continue  # object storage never holds half-written objects
        for folder_name, _, names in os.walk(run_dir / stage_dir):  # os.walk follows no symbolic link
            for name in names:
                if name.startswith(TEMPORARY_PREFIX):
                    Path(folder_name, name).unlink(missing_ok=True)
