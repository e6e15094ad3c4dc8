"""What `locality` measures, for its figure and its JSON."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..locality import LayerLocality, attention_maps, nonlocality

PICTURES = 4  # images in the figure, the first ones; the numbers are of all


class Study(NamedTuple):
    """What the images show of one model."""

    title: str
    layers: list[LayerLocality]
    pictures: list[Tensor]  # (H, W, 3) in [0, 1]
    maps: dict[str, Tensor]  # by layer, (pictures, rows, columns): means over heads
    query: tuple[int, int]
    images: int

    def to_json(self) -> dict[str, Any]:
        def values(tensor: Tensor | None) -> list[float] | None:
            return None if tensor is None else tensor.tolist()

        parts = ("nonlocality", "content", "position", "gate")
        layers = [
            {"name": layer.name} | {part: values(getattr(layer, part)) for part in parts} for layer in self.layers
        ]
        return {"title": self.title, "images": self.images, "query": list(self.query), "layers": layers}


def study(
    model: nn.Module,
    inputs: Tensor,
    pictures: list[Tensor],
    query: tuple[int, int] | None,
    title: str,
    batch: int,
    step: Callable[[int], None],
) -> Study:
    """Measures the model on images, `batch` at a time; calls `step` with how many were done.

    Without a query the maps are those of the patch in the centre.
    """
    shown = min(len(pictures), PICTURES)
    if query is None:
        rows, columns = next(iter(attention_maps(model, inputs[:1], (0, 0)).values())).shape[2:]
        query = rows // 2, columns // 2
    maps = attention_maps(model, inputs[:shown], query)

    def batches() -> Iterator[Tensor]:
        for part in inputs.split(batch):
            yield part
            step(len(part))

    layers = nonlocality(model, batches())
    means = {name: attention.mean(dim=1).cpu() for name, attention in maps.items()}
    return Study(title, layers, pictures[:shown], means, query, len(inputs))
