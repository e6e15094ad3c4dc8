"""What is trained on: Fashion-MNIST as tensors, or a folder of images through timm's transforms.

Randomness belongs to the place in the data order: batch b of epoch e looks the same whenever it is drawn, so a run that
is resumed in the middle of an epoch goes on with the very images that it would have seen.
"""

import gzip
import math
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from torchvision.datasets import ImageFolder

from .files import write_atomically

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,), (0.3530,)
IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
PADDING = -100  # the label of what only fills a batch; cross_entropy ignores it

Kind = Literal["idx", "folder"]


class UnreadableImageError(OSError):
    """A file among the images that is no whole image; the text names it."""


class Batch(NamedTuple):
    """Indices of a batch's images, and the seed of its augmentation; None: none."""

    indices: list[int]
    seed: int | None


class Split(Protocol):
    """Images with labels that come in batches: (B, C, H, W) float32, normalised, and (B,) int64.

    `batches` raises UnreadableImageError where a file is damaged.
    """

    labels: Tensor

    def batches(self, plan: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Which training images are used, and what is done to them; by default all, and nothing.

    Attributes:
        sampling_ratio: share of each class's images that is used; `seed` decides which.
        hflip: probability that an image is mirrored.
        crop_padding: random shifts in pixels, of IDX images.
        auto_augment, reprob: timm's policy ("": none) and the probability of random erasing, of image files.
    """

    sampling_ratio: float = 1.0
    seed: int = 0
    hflip: float = 0.0
    crop_padding: int = 0
    auto_augment: str = ""
    reprob: float = 0.0


@dataclass(frozen=True)
class Data:
    """A training and a test split, and what a model must know of their images."""

    train: Split
    test: Split
    img_size: tuple[int, int]
    in_chans: int
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def mix_seeds(*parts: int) -> int:
    """One seed of several numbers; neighbours give unrelated ones."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def rng_state() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators, in types that torch.load takes for weights."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002, timm draws from this generator
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_rest": [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), *state["numpy_rest"]))  # noqa: NPY002
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002, timm draws from this generator
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same random numbers inside whatever came before, and outside as if nothing had been drawn."""
    before = rng_state()
    seed_all(seed)
    try:
        yield
    finally:
        set_rng_state(before)


def epoch_plan(
    length: int, batch_size: int, *, epoch: int, seed: int, repeats: int = 1, rank: int = 0, world: int = 1
) -> list[Batch]:
    """One process's batches of one epoch: as many for each process as the images fill, all of them full.

    Which images are left out, fewer than all processes take in a step, is another draw in each epoch.

    Args:
        length: images in the training split.
        batch_size: images of one process in a step.
        repeats: how often an image is drawn, differently augmented, in an epoch of unchanged length: then one of
            `repeats` images is drawn in an epoch (repeated augmentation, as timm and DeiT have it, without their
            rounding).
        rank, world: which process of how many.
    """
    images = range(length)
    sampler: Any
    if repeats > 1:
        # timm would round an epoch down to a multiple of 256 images, half of some small sets
        sampler = RepeatAugSampler(images, num_replicas=world, rank=rank, num_repeats=repeats, selected_round=1)
    else:
        sampler = DistributedSampler(images, num_replicas=world, rank=rank, drop_last=True)  # type: ignore[arg-type]
    sampler.set_epoch(mix_seeds(seed, epoch))
    order = list(sampler)
    return [
        Batch(order[first : first + batch_size], mix_seeds(seed, epoch, rank, first))
        for first in range(0, len(order) - batch_size + 1, batch_size)
    ]


def evaluation_plan(length: int, batch_size: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
    """One process's share of the test split: the same number of batches for all, filled up with index -1."""
    mine = [index if index < length else -1 for index in range(rank, math.ceil(length / world) * world, world)]
    return [Batch(mine[first : first + batch_size], None) for first in range(0, len(mine), batch_size)]


def subsample(labels: Tensor, ratio: float, seed: int) -> Tensor:
    """Indices that keep this share of each class, at least one image of each; ascending, the same for a seed."""
    if ratio == 1 or not len(labels):
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(ratio * len(members)))
        kept.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(kept).sort().values


def shift_and_flip(images: Tensor, padding: int, hflip: float, generator: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) cropped at random from itself padded with zeros, and mirrored at a rate."""
    batch, _, height, width = images.shape
    down, across = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < hflip
    columns = torch.arange(width)
    rows = down + torch.arange(height)
    columns = across + torch.where(mirrored, columns.flip(0), columns)
    padded = F.pad(images, (padding,) * 4)
    image = torch.arange(batch)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class TensorSplit:
    """Images that fit into memory, (N, C, H, W) uint8, augmented a batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor, padding: int, hflip: float) -> None:
        self.images = images
        self.labels = labels
        self.padding = padding
        self.hflip = hflip

    def batches(self, plan: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in plan:
            indices = torch.tensor(batch.indices)
            images = self.images[indices]
            if batch.seed is not None:
                images = shift_and_flip(images, self.padding, self.hflip, torch.Generator().manual_seed(batch.seed))
            normalised = (images.float() / 255 - FASHION_MNIST_MEAN[0]) / FASHION_MNIST_STD[0]
            yield normalised.contiguous(), self.labels[indices].where(indices >= 0, PADDING)


class _Unreadable(NamedTuple):
    """Stands for an image in a worker process: an exception would arrive with that process's traceback as its text."""

    path: str
    reason: str


class _SeededFolder(Dataset[tuple[Tensor, int] | _Unreadable]):
    """Item (index, seed): the image of that index, transformed under that seed."""

    def __init__(self, folder: ImageFolder, kept: list[int]) -> None:
        self.folder = folder
        self.kept = kept

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[Tensor, int] | _Unreadable:
        index, seed = item
        path, label = self.folder.samples[self.kept[index]]
        try:
            image = self.folder.loader(path)
        except Exception as error:  # Pillow has no common class for what a damaged file can raise
            return _Unreadable(path, str(error))
        with nullcontext() if seed is None else seeded(seed):
            return self.folder.transform(image), label if index >= 0 else PADDING


def _collate(items: list[tuple[Tensor, int] | _Unreadable]) -> Any:
    """The batch, or its first image that cannot be read."""
    return next((item for item in items if isinstance(item, _Unreadable)), None) or default_collate(items)


class FolderSplit:
    """Images on disk, read and transformed by worker processes."""

    def __init__(self, folder: ImageFolder, kept: Tensor, workers: int) -> None:
        self.labels = torch.tensor(folder.targets)[kept]
        self.dataset = _SeededFolder(folder, kept.tolist())
        self.workers = workers

    def batches(self, plan: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        items = [
            [
                (index, None if batch.seed is None else mix_seeds(batch.seed, position))
                for position, index in enumerate(batch.indices)
            ]
            for batch in plan
        ]
        loader = DataLoader(
            self.dataset,
            batch_sampler=items,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the loader would draw from the global one, whose state is the run's
        )
        for batch in loader:
            if isinstance(batch, _Unreadable):
                raise UnreadableImageError(f"{batch.path} cannot be read as an image: {batch.reason}")
            yield tuple(batch)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, which asks for 0 bits at the strongest level: black, as before Pillow 13, which refuses it."""
    return auto_augment.posterize(image, bits) if bits > 0 else image.point(lambda _: 0)


auto_augment.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), posterize))


def kind_of(path: Path) -> Kind:
    """Whether the folder holds Fashion-MNIST's files or train/ and val/; raises FileNotFoundError if neither."""
    if any((path / images).is_file() for images, _ in IDX_FILES.values()):
        return "idx"
    if (path / "train").is_dir() and (path / "val").is_dir():
        return "folder"
    raise FileNotFoundError(
        f"no data in {path}: there is neither {IDX_FILES['train'][0]} (Fashion-MNIST; on Debian and Ubuntu: "
        f"apt-get install dataset-fashion-mnist, it comes to {FASHION_MNIST}) nor train/ and val/ with a folder of "
        "images for each class"
    )


def read_idx(path: Path) -> Tensor:
    """A gzipped IDX file of bytes as a uint8 tensor; raises ValueError where it is damaged."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {content[:4]!r}")
    dims = content[3]
    header = 4 + 4 * dims
    shape = struct.unpack(f">{dims}I", content[4:header]) if len(content) >= header else ()
    if len(content) != header + math.prod(shape) or not shape:
        raise ValueError(f"{path} is damaged: its header tells of shape {shape}, but it has {len(content)} bytes")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)


def write_idx(path: Path, values: np.ndarray) -> None:
    """A gzipped IDX file of bytes, the same for the same values."""
    header = b"\0\0\x08" + struct.pack(f">B{values.ndim}I", values.ndim, *values.shape)
    content = gzip.compress(header + values.astype(np.uint8).tobytes(), mtime=0)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_split(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) uint8 and (N,) int64; raises FileNotFoundError and ValueError as `load`."""
    names = IDX_FILES[split]
    for name in names:
        if not (path / name).is_file():
            there = next(file for files in IDX_FILES.values() for file in files if (path / file).is_file())
            raise FileNotFoundError(f"{path / name} is missing, but {path / there} is there")
    images, labels = (read_idx(path / name) for name in names)
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"{path}: {names[0]} must be images and {names[1]} as many labels, but their shapes are "
            f"{tuple(images.shape)} and {tuple(labels.shape)}"
        )
    return images[:, None], labels.long()


def load(path: Path, img_size: int, workers: int, augmentation: Augmentation) -> Data:
    """The data of a folder.

    Args:
        img_size: side of the images in pixels; IDX images keep theirs.
        workers: processes that read image files.

    Raises:
        FileNotFoundError: there is no data, or a part of it is missing.
        ValueError: it is damaged.
    """
    if kind_of(path) == "idx":
        return _load_idx(path, augmentation)
    return _load_folder(path, img_size, workers, augmentation)


def _load_idx(path: Path, augmentation: Augmentation) -> Data:
    """Fashion-MNIST, or anything in its format, wholly in memory; of a test split alone no image is for training."""
    test_images, test_labels = read_split(path, "test")
    if any((path / name).is_file() for name in IDX_FILES["train"]):
        images, labels = read_split(path, "train")
    else:
        images, labels = test_images[:0], test_labels[:0]
    if images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"{path}: training images have shape {tuple(images.shape[2:])}, test images {tuple(test_images.shape[2:])}"
        )
    kept = subsample(labels, augmentation.sampling_ratio, augmentation.seed)
    shifts = augmentation.crop_padding, augmentation.hflip
    return Data(
        TensorSplit(images[kept], labels[kept], *shifts),
        TensorSplit(test_images, test_labels, *shifts),
        img_size=(images.shape[2], images.shape[3]),
        in_chans=1,
        classes=[str(label) for label in range(int(torch.cat((labels, test_labels)).max()) + 1)],
        mean=FASHION_MNIST_MEAN,
        std=FASHION_MNIST_STD,
    )


def _load_folder(path: Path, img_size: int, workers: int, augmentation: Augmentation) -> Data:
    """train/ and val/ of a folder of images, transformed as for ImageNet."""
    train_transform = create_transform(
        img_size,
        is_training=True,
        hflip=augmentation.hflip,
        auto_augment=augmentation.auto_augment or None,
        interpolation="bicubic",
        re_prob=augmentation.reprob,
        re_mode="pixel",
    )
    test_transform = create_transform(img_size, interpolation="bicubic", crop_pct=224 / 256)
    train, test = (
        ImageFolder(str(path / split), transform)
        for split, transform in (("train", train_transform), ("val", test_transform))
    )
    if train.classes != test.classes:
        difference = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"{path}: train/ and val/ must have the same classes, but differ in {', '.join(difference)}")
    kept = subsample(torch.tensor(train.targets), augmentation.sampling_ratio, augmentation.seed)
    return Data(
        FolderSplit(train, kept, workers),
        FolderSplit(test, torch.arange(len(test)), workers),
        img_size=(img_size, img_size),
        in_chans=3,
        classes=train.classes,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
