"""A data set in Fashion-MNIST's files that a tiny model learns in seconds, and a folder of small pictures."""

from pathlib import Path

import numpy as np
from PIL import Image
from training.data import IDX_FILES, write_idx

SIZE, CLASSES, TRAIN, TEST = 12, 3, 96, 31


def learnable_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright band in a third of the rows that tells the class."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % CLASSES)
    images = generator.integers(0, 100, (count, SIZE, SIZE))
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4] += 120
    return images, labels


def write_all(folder: Path) -> Path:
    """Both splits; returns the folder."""
    for seed, (split, count) in enumerate((("train", TRAIN), ("test", TEST))):
        for name, values in zip(IDX_FILES[split], learnable_images(count, seed), strict=True):
            write_idx(folder / name, values)
    return folder


def write_folder(folder: Path, suffix: str = "png") -> Path:
    """train/ and val/ with two classes of small pictures of noise; returns the folder."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.{suffix}")
    return folder
