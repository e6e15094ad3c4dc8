"""The formulas of docs/mathematics.md, in float64, against autograd through the reference layer's own operations."""

import math
import re
from pathlib import Path

import pytest
import torch

from convit_kernels import GPSA, locality
from convit_kernels.backends.reference import relative_coordinates
from convit_kernels.equivalence import eager_attention, relative_indices, with_gradients
from convit_kernels.relpos import axis_tables, relative_position_tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "mathematics.md"
BATCH, HEADS, HEAD_DIM, SCALE = 2, 3, 5, 0.3
NAMES = ("out", "dq", "dk", "dv", "dw", "d_lambda")


class Formulas:
    """Every quantity of the page for one draw of inputs, by its formula there."""

    def __init__(self, grid: tuple[int, int], dropout_p: float = 0.0) -> None:
        self.grid, tokens = grid, math.prod(grid)
        shape = (BATCH, HEADS, tokens, HEAD_DIM)
        self.q, self.k, self.v, self.d_out = torch.randn(4, *shape, dtype=torch.float64).unbind()
        self.w = torch.randn(HEADS, 3, dtype=torch.float64) * torch.tensor([0.5, 0.5, 0.2])
        self.gate_parameter = torch.tensor([-40.0, 0.3, 40.0], dtype=torch.float64)
        self.mask = (torch.rand(BATCH, HEADS, tokens, tokens) >= dropout_p).double() / (1 - dropout_p)

        self.r = relative_indices(grid, self.q)[0]  # (N, N, 3)
        self.g = torch.sigmoid(self.gate_parameter)[:, None, None]
        self.s = SCALE * self.q @ self.k.mT
        self.c = self.s.softmax(-1)
        self.p = torch.einsum("ijf,hf->hij", self.r, self.w).softmax(-1)
        self.a = (1 - self.g) * self.c + self.g * self.p

        self.d_a = self.mask * (self.d_out @ self.v.mT)
        self.dc, self.dp = ((attention * self.d_a).sum(-1, keepdim=True) for attention in (self.c, self.p))
        self.d_s = (1 - self.g) * self.c * (self.d_a - self.dc)
        self.d_p = (self.g * self.d_a).sum(0)
        self.e = torch.einsum("hij,ijf->hif", self.p, self.r)

    def results(self) -> dict[str, torch.Tensor]:
        g = self.g.flatten()
        return {
            "out": (self.mask * self.a) @ self.v,
            "dq": SCALE * self.d_s @ self.k,
            "dk": SCALE * self.d_s.mT @ self.q,
            "dv": (self.mask * self.a).mT @ self.d_out,
            "dw": torch.einsum("hij,hijf->hf", self.p * self.d_p, self.r - self.e[:, :, None]),
            "d_lambda": g * (1 - g) * (self.dp - self.dc).sum((0, 2, 3)),
        }

    def by_autograd(self, renormalise: bool = True) -> dict[str, torch.Tensor]:
        def attention(q, k, v, w, gate):
            return eager_attention(q, k, v, w, gate, self.r[None], SCALE, keep=self.mask, renormalise=renormalise)

        return with_gradients(attention, (self.q, self.k, self.v, self.w, self.gate_parameter), self.d_out, NAMES)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * max(1.0, expected.abs().max().item()))


@pytest.fixture(params=[(3, 5), (4, 4), (1, 7)], ids=str)
def formulas(request: pytest.FixtureRequest) -> Formulas:
    torch.manual_seed(0)
    return Formulas(request.param)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients(name: str, dropout_p: float):
    torch.manual_seed(1)
    formulas = Formulas((3, 5), dropout_p)
    close(formulas.results()[name], formulas.by_autograd()[name])


def test_renormalisation_changes_nothing(formulas: Formulas):
    close(formulas.a.sum(-1), torch.ones_like(formulas.a[..., 0]))
    without, renormalised = (formulas.by_autograd(renormalise) for renormalise in (False, True))
    for name in NAMES:
        close(without[name], renormalised[name])


def test_position_factorises(formulas: Formulas):
    rows, columns = relative_position_tables(formulas.w, formulas.grid)
    product = torch.einsum("hyu,hxw->hyxuw", rows, columns).flatten(3).flatten(1, 2)
    close(product, formulas.p)
    values = formulas.v.unflatten(2, formulas.grid)
    along_x = torch.einsum("hxw,bhuwd->bhuxd", columns, values)
    close(torch.einsum("hyu,bhuxd->bhyxd", rows, along_x).flatten(2, 3), formulas.p @ formulas.v)


def test_start_as_a_convolution():
    alpha, (across, down) = 1.7, (2.0, -1.0)
    r = relative_indices((4, 6), torch.empty(0, dtype=torch.float64))[0]
    w = alpha * torch.tensor([2 * across, 2 * down, -1], dtype=torch.float64)
    square = -alpha * ((r[..., 0] - across) ** 2 + (r[..., 1] - down) ** 2) + alpha * (across**2 + down**2)
    close(r @ w, square)
    layer = GPSA(18, 9, locality_strength=alpha)
    looked_at = torch.tensor([[x, y] for x in (-1, 0, 1) for y in (-1, 0, 1)])
    torch.testing.assert_close(layer.pos_proj.weight[:, :2], 2 * alpha * looked_at)


def test_what_the_backward_keeps_of_the_forward():
    torch.manual_seed(2)
    for dropout_p in (0.0, 0.4):
        formulas = Formulas((3, 5), dropout_p)
        lse = torch.logsumexp(formulas.s, -1, keepdim=True)
        close((formulas.s - lse).exp(), formulas.c)
        content = (formulas.mask * formulas.c) @ formulas.v
        position = (formulas.mask * formulas.p) @ formulas.v
        close((formulas.d_out * content).sum(-1, keepdim=True), formulas.dc)
        close((formulas.d_out * position).sum(-1, keepdim=True), formulas.dp)
        both = (1 - formulas.g) * formulas.dc + formulas.g * formulas.dp
        close((formulas.d_out * formulas.results()["out"]).sum(-1, keepdim=True), both)


def test_positional_gradient_through_the_tables(formulas: Formulas):
    rows, columns = relative_position_tables(formulas.w, formulas.grid)
    d_p = formulas.d_p.unflatten(2, formulas.grid).unflatten(1, formulas.grid)
    d_rows = torch.einsum("hyxuw,hxw->hyu", d_p, columns)
    d_columns = torch.einsum("hyxuw,hyu->hxw", d_p, rows)

    def axis(table: torch.Tensor, d_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place = torch.arange(table.shape[-1])
        offset = place - place[:, None]
        d_logit = table * (d_table - (table * d_table).sum(-1, keepdim=True))
        return (d_logit * offset).sum((1, 2)), (d_logit * offset**2).sum((1, 2))

    (linear_y, quadratic_y), (linear_x, quadratic_x) = axis(rows, d_rows), axis(columns, d_columns)
    expected = formulas.by_autograd()["dw"]
    close(torch.stack((linear_x, linear_y, quadratic_x + quadratic_y), 1), expected)


def test_mean_offsets_factorise(formulas: Formulas):
    def moments(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place = torch.arange(table.shape[-1])
        offset = place - place[:, None]
        return (table * offset).sum(-1), (table * offset**2).sum(-1)

    (mean_y, square_y), (mean_x, square_x) = map(moments, relative_position_tables(formulas.w, formulas.grid))
    (height, width) = formulas.grid
    close(formulas.e[..., 0], mean_x.repeat(1, height))
    close(formulas.e[..., 1], mean_y.repeat_interleave(width, 1))
    close(formulas.e[..., 2], square_x.repeat(1, height) + square_y.repeat_interleave(width, 1))


def test_identities_of_rows(formulas: Formulas):
    close(formulas.d_s.sum(-1), torch.zeros_like(formulas.d_s[..., 0]))
    rounded = formulas.dc + 0.01 * torch.randn_like(formulas.dc)
    close(rounded + (formulas.c * (formulas.d_a - rounded)).sum(-1, keepdim=True), formulas.dc)
    weighed = torch.einsum("hij,hijf->hif", formulas.p, formulas.r - formulas.e[:, :, None])
    close(weighed, torch.zeros_like(weighed))
    close((formulas.p * (formulas.d_a - formulas.dc)).sum(-1, keepdim=True), formulas.dp - formulas.dc)


def test_nonlocality_from_the_diagonals(formulas: Formulas):
    def by_offset(table: torch.Tensor) -> dict[int, torch.Tensor]:
        side = table.shape[-1]
        return {o: table.diagonal(o, 1, 2).sum(-1) for o in range(1 - side, side)}

    rows, columns = map(by_offset, relative_position_tables(formulas.w, formulas.grid))
    total = sum(rows[oy] * columns[ox] * math.hypot(oy, ox) for oy in rows for ox in columns)
    dense = (formulas.p * torch.hypot(formulas.r[..., 0], formulas.r[..., 1])).sum((1, 2))
    close(total, dense)
    close(locality._position_distance(formulas.w, formulas.grid), dense / formulas.p.shape[1])


@pytest.mark.parametrize("sides", [(6,), (2, 3), (2, 1, 3)])
def test_other_grids_and_spacings(sides: tuple[int, ...]):
    spacing = (0.5, 2.0, 1.5)[-len(sides) :]
    w = torch.randn(HEADS, len(sides) + 1, dtype=torch.float64)
    offsets = relative_coordinates(sides, w, spacing)
    logits = sum(w[:, at, None, None] * offset + w[:, -1, None, None] * offset**2 for at, offset in enumerate(offsets))
    product = torch.ones(HEADS, 1, 1, dtype=torch.float64)
    for table in axis_tables(w, sides, spacing):
        product = torch.einsum("hij,hkl->hikjl", product, table).flatten(3, 4).flatten(1, 2)
    close(product, logits.softmax(-1))


def test_a_key_mask(formulas: Formulas):
    m = torch.rand(formulas.a.shape[-1], dtype=torch.float64)
    numerator, denominator = formulas.a @ (m[:, None] * formulas.v), formulas.a @ m
    masked = formulas.a * m
    close(numerator / denominator[..., None], (masked / masked.sum(-1, keepdim=True)) @ formulas.v)


def test_functions_are_where_the_page_says():
    text = PAGE.read_text()
    # "`function` in [text](../path)", where path is a file or csrc, and the kernels of the table
    names = re.findall(r"`(\w+)` in\s+\[[^\]]+\]\(\.\./([\w./]+)\)", text)
    names += [(name, "convit_kernels/triton/backward.py") for name in re.findall(r"`(\w+_kernel)`", text)]
    assert len(names) > 20
    for name, path in names:
        place = ROOT / path
        files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
        assert any(re.search(rf"\b{name}\b", file.read_text()) for file in files), f"{name} is not in {path}"
