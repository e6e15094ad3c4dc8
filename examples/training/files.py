"""What a run keeps on disk: checkpoint, weights, logs. Each survives a kill, and a disk that is full, at any moment."""

import csv
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from convit_kernels import models

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.safetensors"
STEPS_LOG = "steps.csv"
EVALUATIONS_LOG = "evaluations.csv"


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` fill a temporary file and puts it in the place of `path`, which is never half written.

    Raises:
        OSError: it cannot be written, because the disk is full, say; then `path` is what it was before.
    """
    temporary = _temporary(path)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}; what was there before is kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(output: Path) -> None:
    """Frees what a process that was killed while it wrote a file of a run has left in its folder."""
    for name in (CHECKPOINT, WEIGHTS, STEPS_LOG, EVALUATIONS_LOG):
        _temporary(output / name).unlink(missing_ok=True)


class CsvLog:
    """Rows by step, each in the file once `append` returns; rows after a resumed step are cut first.

    Raises:
        FileExistsError: the file of the run that is resumed has other columns.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], resumed_step: int | None) -> None:
        kept: list[list[str]] = []
        if resumed_step is not None and path.is_file():
            with path.open(newline="") as file:
                header, *rows = list(csv.reader(file)) or [[]]
            if header and header != list(columns):
                raise FileExistsError(f"{path} has other columns than this run: move it away to resume")
            # a row that a kill cut short comes after the checkpoint, and may be the only one that is not whole
            kept = [row for row in rows if len(row) == len(columns) and int(row[0]) <= resumed_step]
        content = b"".join(_csv_line(row) for row in (columns, *kept))
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
        # without a buffer: a row that does not fit on the disk would be written again when the file is closed
        self.file = path.open("ab", buffering=0)
        self.columns = columns

    def append(self, row: Mapping[str, Any]) -> None:
        line = _csv_line([row.get(name, "") for name in self.columns])
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            raise OSError(f"{self.file.name} cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        os.fsync(self.file.fileno())


def _csv_line(row: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerow(row)
    return text.getvalue().encode()


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replaces a checkpoint as a whole; raises OSError where it cannot be written, and the old one stays."""

    def write(temporary: Path) -> None:
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch reports what the file raised in words of its own
                raise error.__context__ from None
            raise

    write_atomically(path, write)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error!r:.200}") from error
    if not isinstance(state, dict) or not {"identity", "step", "model", "optimizer"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of this script")
    return state


def write_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a model's weights, with what is known of them as JSON in the file's metadata."""
    text = {name: json.dumps(value) for name, value in metadata.items()}
    content = save({name: tensor.contiguous() for name, tensor in state.items()}, text)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_weights(path: Path) -> tuple[models.ConViT, dict[str, Any]]:
    """The model of a weights.safetensors, in evaluation mode, and its metadata.

    The metadata: "model" the arguments, "mean" and "std" of the images it expects, "classes", "test_accuracy", "step".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else.
    """
    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    with file:
        metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        if "model" not in metadata:
            raise ValueError(f"{path} holds no weights of a ConViT: its metadata lack the model's arguments")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    model = models.ConViT(**metadata["model"])
    model.load_state_dict(state)
    return model.eval(), metadata


def not_finite(state: Any, name: str = "") -> Iterator[str]:
    """The names of the floating-point tensors in nested dictionaries that hold NaN or infinity."""
    if isinstance(state, Tensor):
        if state.is_floating_point() and not state.isfinite().all():
            yield name
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from not_finite(value, f"{name}.{key}".strip("."))
