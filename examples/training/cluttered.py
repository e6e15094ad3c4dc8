"""Cluttered Fashion-MNIST: each picture at a random place of a larger canvas, among fragments of others.

In the manner of the cluttered and translated MNIST of Mnih et al. (2014, arXiv 1406.6247): where the picture is does
not matter, what is near to what does. It is made of Fashion-MNIST alone and kept in the same files, so whatever takes
the one takes the other.

The canvas is 56 x 56 pixels, black: 14 x 14 patches of 4 x 4 pixels. The picture, 28 x 28, comes to any of its 29 x 29
places with the same probability. Then `FRAGMENTS` squares of 8 x 8 pixels are laid over it, each cut out of a random
place of a random picture of the same split, each to a random place within the canvas; where things meet, the brighter
pixel stays. A picture has one canvas: what varies in training is what is done to any image there.
"""

from pathlib import Path

import numpy as np

from .data import IDX_FILES, kind_of, read_split, write_idx

CANVAS, SIDE, FRAGMENT, FRAGMENTS = 56, 28, 8, 8
TRAIN, VALIDATION, TEST = 10_000, 5_000, 5_000
SEED = 0
VALIDATION_FOLDER = "validation"


def cluttered(pictures: np.ndarray, chosen: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(count, CANVAS, CANVAS) uint8: the canvas of each of the `chosen` of `pictures`, (N, SIDE, SIDE) uint8."""
    count = len(chosen)
    canvases = np.zeros((count, CANVAS, CANVAS), np.uint8)
    for canvas, index, (top, left) in zip(
        canvases, chosen, generator.integers(0, CANVAS - SIDE + 1, (count, 2)), strict=True
    ):
        canvas[top : top + SIDE, left : left + SIDE] = pictures[index]
    sources = chosen[generator.integers(0, count, (count, FRAGMENTS))]
    cuts = generator.integers(0, SIDE - FRAGMENT + 1, (count, FRAGMENTS, 2))
    places = generator.integers(0, CANVAS - FRAGMENT + 1, (count, FRAGMENTS, 2))
    for canvas, *fragments in zip(canvases, sources, cuts, places, strict=True):
        for source, (y, x), (top, left) in zip(*fragments, strict=True):
            part = canvas[top : top + FRAGMENT, left : left + FRAGMENT]
            np.maximum(part, pictures[source, y : y + FRAGMENT, x : x + FRAGMENT], out=part)
    return canvases


def make(source: Path, folder: Path) -> Path:
    """Writes the data set of Fashion-MNIST's files in `source` where it is not yet; returns the folder.

    The first TRAIN pictures of a random order of the training split are for training, the first TEST of the test split
    for the test. `folder`/VALIDATION_FOLDER has the same for training, and for the test the VALIDATION pictures after
    them in that order: settings are chosen there.

    Raises:
        FileNotFoundError, ValueError: as `training.data.load`.
    """
    validation = folder / VALIDATION_FOLDER
    written = [place / name for place in (folder, validation) for names in IDX_FILES.values() for name in names]
    if all(path.is_file() for path in written):
        return folder
    if kind_of(source) != "idx":
        raise ValueError(f"cluttered images are made of Fashion-MNIST's files, but {source} has folders of images")
    generator = np.random.default_rng(SEED)
    (pictures, labels), (test_pictures, test_labels) = (
        tuple(tensor.numpy() for tensor in read_split(source, split)) for split in ("train", "test")
    )
    test_labels = test_labels[:TEST]
    if pictures.shape[1:] != (1, SIDE, SIDE) or len(labels) < TRAIN + VALIDATION:
        raise ValueError(
            f"{source}: cluttered images are made of {TRAIN + VALIDATION} pictures and more of {SIDE} x {SIDE} pixels, "
            f"but these are {len(labels)} of {pictures.shape[2]} x {pictures.shape[3]}"
        )
    order = generator.permutation(len(labels))
    parts = {"train": order[:TRAIN], "validation": order[TRAIN : TRAIN + VALIDATION]}
    made = {name: (cluttered(pictures[:, 0], part, generator), labels[part]) for name, part in parts.items()}
    made["test"] = cluttered(test_pictures[:, 0], np.arange(len(test_labels)), generator), test_labels
    validation.mkdir(parents=True, exist_ok=True)
    for place, test in ((validation, "validation"), (folder, "test")):
        for split, name in (("train", "train"), ("test", test)):
            for file, values in zip(IDX_FILES[split], made[name], strict=True):
                write_idx(place / file, values)
    return folder
