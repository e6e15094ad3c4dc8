"""Options that several commands share. Each is checked as it is read, before any work."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from .output import check_writable, stop


def _device(name: str) -> str:
    """The device meant, if this machine has it."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # which is refused
    if device.type not in ("cpu", "cuda"):
        raise stop(f"--device must be cpu or cuda (of several GPUs cuda:N), but is {name!r}", 2)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise stop(f"--device {name}: torch sees {f'{count} GPUs, from cuda:0 on,' if count else 'no GPU'} here", 2)
    return name


def _writable(parameter: typer.CallbackParam, path: Path | None, folder: bool) -> Path | None:
    if path is not None:
        try:
            check_writable(parameter.opts[0], path, folder)
        except ValueError as error:
            raise stop(error, 2) from error
    return path


def file_to_write(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """The callback of an option that names a file."""
    return _writable(parameter, path, folder=False)


def folder_to_write(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """The callback of an option that names a folder."""
    return _writable(parameter, path, folder=True)


Device = Annotated[
    str, typer.Option(help="cpu, cuda (of several cuda:N), or auto: cuda if there is one, else cpu.", callback=_device)
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the results into this JSON file.", callback=file_to_write)
]
