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
TRAIN, TEST = 4_000, 2_000
SEED = 0
VALIDATION, PLAIN = "validation", "plain"  # folders


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

    TRAIN random pictures of the training split are for training, the first TEST of the test split for the test.
    `folder`/VALIDATION has the same for training, and for the test TEST others of the training split: settings are
    chosen there. `folder`/PLAIN has the pictures of `folder` as they are, without canvas and fragments.

    Raises:
        FileNotFoundError, ValueError: as `training.data.load`.
    """
    places = folder, folder / VALIDATION, folder / PLAIN
    if all((place / name).is_file() for place in places for names in IDX_FILES.values() for name in names):
        return folder
    if kind_of(source) != "idx":
        raise ValueError(f"cluttered images are made of Fashion-MNIST's files, but {source} has folders of images")
    generator = np.random.default_rng(SEED)
    (pictures, labels), (test_pictures, test_labels) = (
        tuple(tensor.numpy() for tensor in read_split(source, split)) for split in ("train", "test")
    )
    if pictures.shape[1:] != (1, SIDE, SIDE) or len(labels) < TRAIN + TEST:
        raise ValueError(
            f"{source}: cluttered images are made of {TRAIN + TEST} pictures and more of {SIDE} x {SIDE} pixels, "
            f"but these are {len(labels)} of {pictures.shape[2]} x {pictures.shape[3]}"
        )
    train, validation = np.split(generator.permutation(len(labels))[: TRAIN + TEST], [TRAIN])
    test = np.arange(len(test_labels[:TEST]))
    canvases = cluttered(pictures[:, 0], train, generator), labels[train]
    held_out = cluttered(pictures[:, 0], validation, generator), labels[validation]
    splits = {
        folder: (canvases, (cluttered(test_pictures[:, 0], test, generator), test_labels[test])),
        folder / VALIDATION: (canvases, held_out),
        folder / PLAIN: ((pictures[train, 0], labels[train]), (test_pictures[test, 0], test_labels[test])),
    }
    for place, (of_train, of_test) in splits.items():
        place.mkdir(parents=True, exist_ok=True)
        for split, arrays in (("train", of_train), ("test", of_test)):
            for file, values in zip(IDX_FILES[split], arrays, strict=True):
                write_idx(place / file, values)
    return folder
