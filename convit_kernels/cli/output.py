"""Where the commands write: the terminal, one line on stderr where they fail, and files, whole or not at all."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

# a file or a pipe has no width of its own: tables must not be cut to 80 columns there
console = Console(width=None if sys.stdout.isatty() else 110)


def stop(reason: object, code: int) -> typer.Exit:
    """Says in one line on stderr why a command ends; returns what to raise: 2 for wrong input, 1 for other failures."""
    typer.secho(" ".join(str(reason).split()), fg="red", err=True)
    return typer.Exit(code)


def check_writable(what: str, path: Path, folder: bool = False) -> None:
    """Raises ValueError, with `what` in its text, where a file, or a folder of files, could not be written later."""
    reason = None
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        reason = "it is a folder" if path.is_dir() else "it is no folder" if folder else "it is no ordinary file"
    elif not path.parent.is_dir():
        reason = f"{path.parent} is no folder" if path.parent.exists() else f"there is no folder {path.parent}"
    else:
        try:
            for place in {path.resolve().parent, *([path] if path.is_dir() else [])}:
                tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            reason = error.strerror
    if reason:
        raise ValueError(f"{what} {path} cannot be written: {reason}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file, or a folder of files: within the block; they stand at `path` when it has ended well.

    A reader sees each file as it was or as it is now, and where the block fails, only as it was.

    Raises:
        OSError: writing has failed, for a full disk say; the text names the file.
    """
    target = path.resolve()  # of a link, what it points to
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            draft = Path(scratch) / target.name
            yield draft
            if draft.is_dir():
                target.mkdir(exist_ok=True)
                for file in draft.iterdir():
                    os.replace(file, target / file.name)
            else:
                os.replace(draft, target)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def write_json(path: Path | None, content: Any) -> None:
    """Writes the file that --json names, if it was given."""
    if path is not None:
        with whole(path) as draft:
            draft.write_text(json.dumps(content, indent=2) + "\n")
        said_written(path)


def said_written(path: Path) -> None:
    console.print(f"written to {path}", markup=False, highlight=False, soft_wrap=True)
