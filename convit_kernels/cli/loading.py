"""Weights and images from a user's files, for `demo` and `locality`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from .. import models


def read_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's weights, .safetensors or .pth; of several in one file those that timm prefers, as the EMA's.

    Raises:
        ValueError: the file holds none.
    """
    try:
        state: dict[str, Tensor] = load_state_dict(str(checkpoint), device="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in many ways
        raise ValueError(f"{checkpoint} cannot be read as a checkpoint: {error}") from error
    return state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Loads a state_dict; raises ValueError, which begins with `what`, where it is another model's."""
    if mismatch := _mismatch(state, model.state_dict()):
        raise ValueError(f"{what}: {mismatch}")
    model.load_state_dict(state)


def _mismatch(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """In what a state_dict differs from the one that is needed, with one example of each kind; "" if in nothing."""
    differences = {
        "parameters are missing": [key for key in expected if key not in given],
        "are unknown": [key for key in given if key not in expected],
        "have another shape": [
            f"{key} {tuple(given[key].shape)}, not {tuple(value.shape)}"
            for key, value in expected.items()
            if key in given and given[key].shape != value.shape
        ],
    }
    return ", ".join(f"{len(keys)} {kind} ({keys[0]})" for kind, keys in differences.items() if keys)


def build_model(name: str, arguments: Mapping[str, Any], checkpoint: Path | None) -> nn.Module:
    """A model of this package or of timm with a checkpoint's weights, or with seeded initial ones.

    The number of classes follows from the checkpoint's head.

    Raises:
        ValueError: an unknown model, arguments that it does not take, or a file that does not hold its weights.
    """
    if name not in models.SIZES and not timm.is_model(name):
        raise ValueError(f"unknown model {name!r}: allowed are {', '.join(models.SIZES)} and timm's models")
    create = getattr(models, name) if name in models.SIZES else lambda **given: timm.create_model(name, **given)
    state = {} if checkpoint is None else read_checkpoint(checkpoint)
    if "head.weight" in state:
        arguments = {"num_classes": state["head.weight"].shape[0]} | dict(arguments)
    torch.manual_seed(0)
    try:
        model: nn.Module = create(**arguments)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if checkpoint is not None:
        load_weights(
            model,
            state,
            f"{checkpoint} does not hold the weights of {name} (where it has other sizes, --model-args gives them)",
        )
    return model.eval()


def load_images(paths: Sequence[Path], model: nn.Module, size: tuple[int, int] | None) -> tuple[Tensor, list[Tensor]]:
    """The images as the model takes them, (B, C, H, W), and as pictures, (H, W, 3) in [0, 1].

    The largest central part of the asked-for shape, resized; normalised as timm's configuration of the model says.

    Raises:
        ValueError: a file that is no image.
    """
    config = resolve_model_data_config(model)
    embed: Any = getattr(model, "patch_embed", None)
    channels = getattr(model, "in_chans", config["input_size"][0])
    height, width = size or getattr(embed, "img_size", None) or config["input_size"][1:]
    mean, std = config["mean"], config["std"]
    if len(mean) != channels:
        mean, std = (channels * (sum(values) / len(values),) for values in (mean, std))
    crop = create_transform(
        (channels, height, width), interpolation=config["interpolation"], mean=mean, std=std, crop_pct=1.0
    )
    inputs = []
    for path in paths:
        try:
            with Image.open(path) as image:
                inputs.append(crop(image.convert("L" if channels == 1 else "RGB")))
        except Exception as error:  # a damaged file fails in many ways
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
    shape = (channels, 1, 1)
    pictures = [image * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape) for image in inputs]
    return torch.stack(inputs), [picture.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0) for picture in pictures]
