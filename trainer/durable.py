"""Files and folders that are whole or as they were before, also after a kill or a power cut: written beside their
place, synced, and renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_file(target: Path, write: Callable[[Path], object]) -> None:
    """Make the file `target` by `write(partial)`; an older one is replaced, missing folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{target.name}")
    write(partial)
    sync(partial)
    partial.replace(target)
    sync(target.parent)


def write_text(target: Path, text: str) -> None:
    """As `write_file`, of a text."""
    write_file(target, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Make the folder `target` by `write(partial)`.

    An older folder of that name is replaced; partial folders of killed runs are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".partial-{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
