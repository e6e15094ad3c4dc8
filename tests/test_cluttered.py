"""examples/training/cluttered.py: what is made of Fashion-MNIST, the same whenever it is made."""

from pathlib import Path

import clutter
import numpy as np
import pytest
from tiny_images import SIZE, write_folder
from training import cluttered
from training.data import IDX_FILES, Augmentation, load, write_idx
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("small_canvases")


def places(canvas: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """Where a picture can be on a canvas that is nowhere darker than it."""
    steps = range(len(canvas) - len(picture) + 1)
    return [(y, x) for y in steps for x in steps if (canvas[y : y + SIZE, x : x + SIZE] >= picture).all()]


def test_each_picture_is_somewhere_among_fragments_of_others() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.integers(1, 256, (40, SIZE, SIZE)).astype(np.uint8)
    chosen = np.arange(0, 40, 2)
    canvases = cluttered.cluttered(pictures, chosen, generator)
    assert canvases.shape == (20, 2 * SIZE, 2 * SIZE) and canvases.dtype == np.uint8
    found = [places(canvas, pictures[index]) for canvas, index in zip(canvases, chosen, strict=True)]
    assert all(len(of_one) == 1 for of_one in found) and len({of_one[0] for of_one in found}) > 10
    for canvas, ((y, x),), index in zip(canvases, found, chosen, strict=True):
        around = canvas.copy()
        around[y : y + SIZE, x : x + SIZE] = 0
        assert 0 < (around > 0).sum() <= cluttered.FRAGMENTS * 4**2
        fragments = set(around[around > 0].tolist())
        assert fragments <= set(pictures[chosen].flat) and not fragments <= set(pictures[index].flat)


def test_the_files_are_those_of_any_such_data(idx_data: Path, tmp_path: Path) -> None:
    folder = cluttered.make(idx_data, tmp_path / "made")
    places = folder, folder / cluttered.VALIDATION, folder / cluttered.PLAIN
    made, validation, plain = (load(place, 0, 0, Augmentation()) for place in places)
    for data, side in ((made, 2 * SIZE), (validation, 2 * SIZE), (plain, SIZE)):
        assert data.img_size == (side, side) and (len(data.train.labels), len(data.test.labels)) == (60, 20)
    assert made.train.images.equal(validation.train.images)  # type: ignore[attr-defined]
    # the test split keeps its order
    whole = load(idx_data, 0, 0, Augmentation()).test
    assert made.test.labels.equal(whole.labels[:20]) and plain.test.labels.equal(whole.labels[:20])
    assert plain.test.images.equal(whole.images[:20])  # type: ignore[attr-defined]


def test_plain_has_the_pictures_that_are_on_the_canvases(idx_data: Path, tmp_path: Path) -> None:
    folder = cluttered.make(idx_data, tmp_path / "made")
    canvases, plain = (load(place, 0, 0, Augmentation()) for place in (folder, folder / cluttered.PLAIN))
    for of_canvases, of_plain in ((canvases.train, plain.train), (canvases.test, plain.test)):
        assert of_canvases.labels.equal(of_plain.labels)
        pairs = zip(of_canvases.images[:, 0].numpy(), of_plain.images[:, 0].numpy(), strict=True)  # type: ignore[attr-defined]
        assert all(places(canvas, picture) for canvas, picture in pairs)


def test_what_is_made_is_the_same_each_time_and_not_made_again(idx_data: Path, tmp_path: Path) -> None:
    one, other = (cluttered.make(idx_data, tmp_path / name) for name in ("one", "other"))
    files = sorted(path.relative_to(one) for path in one.rglob("*.gz"))
    assert len(files) == 12
    assert [path for path in files if (one / path).read_bytes() != (other / path).read_bytes()] == []
    before = (one / files[0]).stat()
    cluttered.make(idx_data, one)
    assert (one / files[0]).stat() == before
    (one / files[-1]).unlink()
    cluttered.make(idx_data, one)
    assert (one / files[-1]).read_bytes() == (other / files[-1]).read_bytes()


def test_validation_has_none_of_the_pictures_for_training(tmp_path: Path) -> None:
    pictures = np.arange(80)[:, None, None] + np.zeros((SIZE, SIZE), int) + 1  # a grey for each
    for split in ("train", "test"):
        for name, values in zip(IDX_FILES[split], (pictures, np.arange(80) % 2), strict=True):
            write_idx(tmp_path / name, values)
    folder = cluttered.make(tmp_path, tmp_path / "made")
    data = load(folder / cluttered.VALIDATION, 0, 0, Augmentation())
    greys = [set(split.images.unique().tolist()) - {0} for split in (data.train, data.test)]  # type: ignore[attr-defined]
    assert [len(of_split) for of_split in greys] == [60, 20]
    assert not greys[0] & greys[1]


def test_other_data_are_refused(idx_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has folders of images"):
        cluttered.make(write_folder(tmp_path / "folder"), tmp_path / "made")
    monkeypatch.setattr(cluttered, "SIDE", 28)
    with pytest.raises(ValueError, match="80 pictures and more of 28 x 28 pixels, but these are 96 of 12 x 12"):
        cluttered.make(idx_data, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_command_says_what_it_made_or_why_it_cannot(idx_data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(idx_data), "--output", str(tmp_path / "made")]
    result = CliRunner().invoke(clutter.app, arguments)
    assert result.exit_code == 0 and f"{tmp_path / 'made' / cluttered.PLAIN}" in result.stdout
    assert len(load(tmp_path / "made", 0, 0, Augmentation()).test.labels) == 20
    arguments[1] = str(tmp_path / "nothing")
    result = CliRunner().invoke(clutter.app, [*arguments[:-1], str(tmp_path / "other")])
    assert result.exit_code == 2 and "apt-get install dataset-fashion-mnist" in result.stderr
