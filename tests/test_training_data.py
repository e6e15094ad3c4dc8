"""What is trained on: subsets, plans of epochs, augmentation, the options of each kind of data."""

import dataclasses
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from tiny_images import TEST
from training import data
from training.config import RECIPES, Config, Options, resolve
from training.data import IDX_FILES, Augmentation, load


class TestData:
    def test_a_subset_keeps_the_share_of_each_class(self) -> None:
        labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)[torch.randperm(153)]
        kept = data.subsample(labels, 0.1, seed=0)
        assert torch.bincount(labels[kept]).tolist() == [10, 5, 1]
        assert torch.equal(kept, data.subsample(labels, 0.1, seed=0))
        assert not torch.equal(kept, data.subsample(labels, 0.1, seed=1))
        assert torch.equal(data.subsample(labels, 1, seed=0), torch.arange(153))

    def test_an_epoch_draws_each_image_once_over_the_processes(self) -> None:
        plans = [data.epoch_plan(48, 8, epoch=1, seed=0, rank=rank, world=2) for rank in range(2)]
        assert sorted(index for plan in plans for batch in plan for index in batch.indices) == list(range(48))
        seeds = [batch.seed for plan in plans for batch in plan]
        assert len(set(seeds)) == len(seeds) == 6
        assert plans[0] == data.epoch_plan(48, 8, epoch=1, seed=0, rank=0, world=2)
        for other in ({"epoch": 2, "seed": 0}, {"epoch": 1, "seed": 1}):
            assert plans[0] != data.epoch_plan(48, 8, rank=0, world=2, **other)

    def test_repeated_augmentation_draws_fewer_images_more_often(self) -> None:
        plan = data.epoch_plan(48, 8, epoch=0, seed=0, repeats=3)
        drawn = [index for batch in plan for index in batch.indices]
        assert len(drawn) == 48 and len(set(drawn)) == 16

    @pytest.mark.parametrize("length", [30, 255, 256, 511, 1000])
    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_repeated_augmentation_leaves_an_epoch_as_long_as_it_is(self, length: int, world: int) -> None:
        """timm's sampler alone draws 256 of 511 images."""
        for repeats in (1, 2, 3):
            plans = [
                data.epoch_plan(length, 10, epoch=0, seed=0, repeats=repeats, rank=rank, world=world)
                for rank in range(world)
            ]
            assert [len(plan) for plan in plans] == [length // world // 10] * world
            drawn = Counter(index for plan in plans for batch in plan for index in batch.indices)
            assert drawn.total() == len(plans[0]) * 10 * world
            assert max(drawn.values()) <= repeats and len(drawn) <= math.ceil(length / repeats) + world

    def test_every_image_has_its_turn_in_some_epoch(self) -> None:
        plans = [data.epoch_plan(19, 10, epoch=epoch, seed=0, repeats=3) for epoch in range(40)]
        assert {index for plan in plans for batch in plan for index in batch.indices} == set(range(19))

    def test_an_evaluation_counts_each_image_once_in_as_many_batches_for_all(self) -> None:
        plans = [data.evaluation_plan(TEST, 4, rank=rank, world=2) for rank in range(2)]
        assert len(plans[0]) == len(plans[1])
        indices = [index for plan in plans for batch in plan for index in batch.indices]
        assert sorted(index for index in indices if index >= 0) == list(range(TEST))

    def test_augmented_images_are_shifts_and_mirrors(self) -> None:
        images = torch.arange(1, 2 * 3 * 4 * 5 + 1).reshape(2, 3, 4, 5)
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(data.shift_and_flip(images, 0, 0.0, generator), images)
        assert torch.equal(data.shift_and_flip(images, 0, 1.0, generator), images.flip(3))
        padded = torch.nn.functional.pad(images, (1,) * 4)
        shifts = [padded[:, :, down : down + 4, across : across + 5] for down in range(3) for across in range(3)]
        allowed = torch.stack([*shifts, *(shift.flip(3) for shift in shifts)])
        seen = set()
        for _ in range(100):
            found = data.shift_and_flip(images, 1, 0.5, generator)
            matches = (found == allowed).flatten(2).all(2)  # (18, 2)
            assert matches.sum(0).tolist() == [1, 1]
            seen.update(matches.nonzero()[:, 0].tolist())
        assert seen == set(range(18))

    def test_a_test_split_may_stand_alone(self, idx_data: Path, tmp_path: Path) -> None:
        for name in IDX_FILES["test"]:
            (tmp_path / name).write_bytes((idx_data / name).read_bytes())
        alone, whole = (load(folder, 0, 0, Augmentation(sampling_ratio=0.5)) for folder in (tmp_path, idx_data))
        assert len(alone.train.labels) == 0
        assert alone.test.labels.equal(whole.test.labels)
        assert (alone.img_size, alone.classes) == (whole.img_size, whole.classes)

    def test_seeded_leaves_the_generators_as_they_were(self) -> None:
        def draw() -> tuple[float, float, float]:
            return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

        data.seed_all(3)
        expected = draw()
        data.seed_all(3)
        with data.seeded(5):
            inside = draw()
        assert draw() == expected
        with data.seeded(5):
            assert draw() == inside

    def test_options_of_a_folder_are_the_papers_unless_given(self) -> None:
        options = resolve(Options(model="convit_small", mixup=0.1), "folder")
        assert (options.embed_dim, options.num_heads, options.local_up_to_layer) == (432, 9, 10)
        assert options.mixup == 0.1 and options.cutmix == RECIPES["folder"]["cutmix"]
        assert resolve(Options(model="deit_small"), "folder").local_up_to_layer == 0

    @pytest.mark.parametrize("name", auto_augment._RAND_INCREASING_TRANSFORMS)
    @pytest.mark.parametrize("magnitude", [0, 9, 10])
    def test_the_papers_augmentation_takes_every_strength(self, name: str, magnitude: int) -> None:
        """With timm's own posterize and Pillow 13 one image in some hundred ended the run."""
        pixels = np.random.default_rng(0).integers(1, 256, (20, 24, 3), dtype=np.uint8)
        augmented = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude)(Image.fromarray(pixels))
        assert augmented.size == (24, 20)
        if (name, magnitude) == ("PosterizeIncreasing", 10):
            assert augmented.getextrema() == ((0, 0),) * 3

    def test_a_config_leaves_nothing_open(self) -> None:
        names = [field.name for field in dataclasses.fields(Config)]
        assert sorted(names) == sorted(field.name for field in dataclasses.fields(Options))
        for kind, recipe in RECIPES.items():
            config = resolve(Options(), kind)
            assert [name for name in names if getattr(config, name) is None] == []
            assert (config.epochs, config.steps) == (recipe["epochs"], 0)
            by_steps = resolve(Options(steps=7, warmup_steps=0), kind)
            assert (by_steps.epochs, by_steps.steps, by_steps.warmup_epochs, by_steps.warmup_steps) == (0, 7, 0, 0)
