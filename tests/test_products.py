"""The attention's three products alone, for every unit: sizes of 1 to 65, padding of NaN, against float64.

units/products.cpp is compiled for each unit that this processor runs, and for AVX2 each that has instructions of its
own beyond that.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import kernel_units
import pytest
import torch
from equivalence import make_inputs, with_gradients
from torch import Tensor

import convit_kernels as ck
from convit_kernels import extension

SOURCE = Path(__file__).parent / "units" / "products.cpp"
COMPILER = os.environ.get("CXX", "c++")
pytestmark = [
    pytest.mark.skipif(extension.status["_C"] is not None, reason="needs the built library; the CI builds it"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler: there is no {COMPILER}"),
    pytest.mark.skipif(not kernel_units.ATTENTION.exists(), reason="needs the source tree"),
]
SETS = [] if extension.status["_C"] is not None else extension.instruction_sets()
EMULATED = ["avx512_emulated", "avx512_bf16_emulated", "amx_bf16_emulated"] if "avx2" in SETS else []
UNITS = [*(name for name in SETS if not name.endswith("_emulated")), *EMULATED]
PRODUCTS = [(unit, "bfloat16") for unit in UNITS if "bf16" in unit]
PRODUCTS += [(unit, dtype) for unit in UNITS if "bf16" not in unit for dtype in ("float32", "float64")]
ALIGNED = 16  # a panel of queries begins at whole vectors


def compiled(unit: str, source: Path, flags: list[str], folder: Path) -> ctypes.CDLL:
    flags = [*flags, *kernel_units.definitions(source)]
    if "bf16" in unit:
        flags.append("-DCONVIT_TILES" if "amx" in unit else "-DCONVIT_PAIRS")
    if unit.endswith("_emulated"):
        flags.append("-DCONVIT_SOFTWARE_TILES")
    library = folder / f"{unit}.so"
    command = [COMPILER, "-std=c++17", "-O0", "-g0", "-Wall", "-fPIC", "-shared", f"-I{kernel_units.ATTENTION}"]
    subprocess.run([*command, *flags, str(SOURCE), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Iterator[dict[str, "Future[ctypes.CDLL]"]]:
    folder = tmp_path_factory.mktemp("units")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # the flags are read here: Python's parser does not stand several threads
        yield {unit: pool.submit(compiled, unit, *kernel_units.flags_of(unit), folder) for unit in UNITS}


class Products:
    """The library of one unit, called with tensors, for one of its dtypes."""

    def __init__(self, library: ctypes.CDLL, dtype: str) -> None:
        self.library, self.name = library, dtype
        self.stored = getattr(torch, dtype)
        self.computed = torch.promote_types(self.stored, torch.float32)

    def call(self, product: str, *arguments: Tensor | int) -> None:
        tensors = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        getattr(self.library, f"{product}_{self.name}")(*(ctypes.c_int64(value) for value in tensors))

    def rows(self, count: int, head_dim: int) -> Tensor:
        """Of a larger tensor, NaN between them."""
        wide = torch.full((count, head_dim + 3), float("nan"), dtype=self.stored)
        wide[:, :head_dim] = torch.randn(count, head_dim)
        return wide[:, :head_dim]

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.computed)

    def check(self, found: Tensor, left: Tensor, right: Tensor, before: Tensor | None, sizes: object) -> None:
        """That `found` is before + left right, but for the rounding of such a sum."""
        left, right = left.to(self.stored).double(), right.to(self.stored).double()
        exact, weighed = left @ right, left.abs() @ right.abs()
        if before is not None:
            exact, weighed = exact + before.double(), weighed + before.double().abs()
        allowed = (left.shape[1] + 3) * torch.finfo(self.computed).eps * weighed
        wrong = ~((found.double() - exact).abs() <= allowed)
        assert not wrong.any(), f"(keys, queries, head_dim) {sizes}, at {wrong.nonzero()[:4].tolist()}"


@pytest.fixture(params=PRODUCTS, ids="-".join)
def products(request, libraries):
    unit, dtype = request.param
    found = Products(libraries[unit].result(), dtype)
    before = found.library.faults_so_far()
    yield found
    assert found.library.faults_so_far() == before, (
        "written behind a buffer, padding that is not zero, or another packing"
    )


@pytest.fixture(params=["keys", "queries", "head_dim"])
def sizes(request) -> list[tuple[int, int, int]]:
    """(keys, queries, head_dim), one of them each size and the others odd ones."""
    place = ["keys", "queries", "head_dim"].index(request.param)
    return [(*others[:place], size, *others[place:]) for others in ((5, 19), (49, 33)) for size in range(1, 66)]


def test_scores(products, sizes):
    for keys, queries, head_dim in sizes:
        x, y = products.rows(keys, head_dim), products.rows(queries, head_dim)
        found = products.numbers(keys, queries)
        products.call("scores", x, y, x.stride(0), found, keys, queries, head_dim)
        products.check(found, x, y.T, None, (keys, queries, head_dim))


def panel_of(queries: int) -> tuple[slice, int]:
    """Of a block's queries, those of a panel that is not the first, and how many there are; a last one may be odd."""
    return slice(ALIGNED, ALIGNED + queries), ALIGNED + queries + (ALIGNED if queries % ALIGNED == 0 else 0)


@pytest.mark.parametrize("add", [False, True])
def test_gather(products, sizes, add):
    for keys, queries, head_dim in sizes:
        panel, every = panel_of(queries)
        map, x = products.numbers(keys, queries), products.rows(keys, head_dim)
        before = products.numbers(every, head_dim)
        found = before.clone()
        if not add:
            found[panel] = float("nan")
        products.call("gather", map, x, x.stride(0), found, keys, queries, head_dim, ALIGNED, every, add)
        products.check(found[panel], map.T, x, before[panel] if add else None, (keys, queries, head_dim))
        for others in (slice(ALIGNED), slice(panel.stop, every)):
            assert torch.equal(found[others], before[others])


@pytest.mark.parametrize("add", [False, True])
def test_scatter(products, sizes, add):
    for keys, queries, head_dim in sizes:
        map, y = products.numbers(keys, queries), products.rows(queries, head_dim)
        before = products.numbers(keys, head_dim)
        found = before.clone() if add else torch.full_like(before, float("nan"))
        products.call("scatter", map, y, y.stride(0), found, keys, queries, head_dim, add)
        products.check(found, map, y, before if add else None, (keys, queries, head_dim))


def test_scale(products):
    for queries in range(1, 66):
        for head_dim in (1, 19, 33):
            panel, every = panel_of(queries)
            before = products.numbers(every, head_dim)
            factors = torch.full((every,), float("nan"), dtype=products.computed)
            factors[panel] = torch.where(torch.rand(queries) < 0.5, 1.0, torch.randn(queries))
            found = before.clone()
            products.call("scale", found, factors, queries, head_dim, ALIGNED, every)
            assert torch.equal(found[panel], before[panel] * factors[panel, None])
            for others in (slice(ALIGNED), slice(panel.stop, every)):
                assert torch.equal(found[others], before[others])


def tile_step(library: ctypes.CDLL, left: Tensor, right: Tensor, sums: Tensor) -> Tensor:
    """sums (16, 16) + left (16, 32) right (32, 16) by one instruction, or what stands for it."""
    pairs = right.view(16, 2, 16).transpose(1, 2).contiguous()
    found = sums.clone()
    library.multiply_one_tile(*(ctypes.c_void_p(t.data_ptr()) for t in (left, pairs, found)))
    return found


def powers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randn(shape) * 2.0 ** torch.randint(low, high + 1, shape)


def some(values: list[float], of: Tensor) -> Tensor:
    """A twentieth of the numbers replaced by these."""
    chosen = torch.tensor(values)[torch.randint(len(values), of.shape)]
    return torch.where(torch.rand(of.shape) < 0.05, chosen.to(of.dtype), of)


INFINITY, NAN = float("inf"), float("nan")
TILES = {
    "random values": lambda: (powers(-8, 8, 16, 32), powers(-8, 8, 32, 16), powers(-16, 16, 16, 16)),
    "rounding ties": lambda: (
        torch.randint(-2, 3, (16, 32)) / 2,
        torch.randint(-2, 3, (32, 16)) / 2,
        torch.randint(2**24, 2**25, (16, 16)) * torch.tensor([1.0, -1.0]).repeat(8),
    ),
    "subnormal factors": lambda: (
        some([1e-39, -9e-39, 1e-40], powers(-2, 2, 16, 32)),
        2.0**120 * powers(0, 4, 32, 16),
        powers(-4, 4, 16, 16),
    ),
    "subnormal sums": lambda: (
        2.0**-66 * torch.randint(-3, 4, (16, 32)),
        2.0**-66 * torch.randint(-3, 4, (32, 16)),
        some([0.0, 1e-39, -1e-39, 2.0**-126, -(2.0**-126)], torch.zeros(16, 16)),
    ),
    "a subnormal sum and a normal product": lambda: (
        2.0**-63 * torch.ones(16, 32),
        2.0**-64 * torch.eye(32, 16) * 2.0 ** torch.randint(0, 3, (32, 16)),
        torch.full((16, 16), 2.0**-127) * torch.randint(-1, 2, (16, 16)),
    ),
    "infinities": lambda: (
        some([INFINITY, -INFINITY, 0.0], powers(-2, 2, 16, 32)),
        some([0.0], powers(-2, 2, 32, 16)),
        some([INFINITY, -INFINITY], powers(-2, 2, 16, 16)),
    ),
    "overflow": lambda: (2.0**64 * powers(-1, 1, 16, 32), 2.0**62 * powers(-1, 1, 32, 16), powers(120, 124, 16, 16)),
    "not a number": lambda: (
        some([NAN], powers(-2, 2, 16, 32)),
        some([0.0, NAN], powers(-2, 2, 32, 16)),
        some([NAN, INFINITY], powers(-2, 2, 16, 16)),
    ),
    "any bits": lambda: (
        torch.randint(-(2**15), 2**15, (16, 32), dtype=torch.int16).view(torch.bfloat16),
        torch.randint(-(2**15), 2**15, (32, 16), dtype=torch.int16).view(torch.bfloat16),
        torch.randint(-(2**31), 2**31, (16, 16), dtype=torch.int32).view(torch.float32),
    ),
}


@pytest.fixture
def tile(kind) -> tuple[Tensor, Tensor, Tensor]:
    left, right, sums = TILES[kind]()
    return left.to(torch.bfloat16).contiguous(), right.to(torch.bfloat16).contiguous(), sums.float().contiguous()


def bits(sums: Tensor) -> Tensor:
    """NaN of any sign and payload is one."""
    return torch.where(sums.isnan(), NAN, sums).view(torch.int32)


@pytest.mark.skipif(not EMULATED, reason="the tiles in software are for x86-64 with AVX2")
@pytest.mark.parametrize(
    "kind", [kind for kind in TILES if kind != "any bits"]
)  # the model needs exact sums in float64
def test_software_tiles_are_what_intel_s_manual_says(kind, tile, libraries):
    """Even and odd products apart, each fused and rounded to nearest; subnormal numbers are zero, in and out."""

    def flushed(numbers: Tensor) -> Tensor:
        rounded = numbers.float().double()
        return torch.where(
            rounded.abs() < torch.finfo(torch.float32).tiny, torch.copysign(torch.zeros(()), rounded), rounded
        )

    left, right, sums = (flushed(t) for t in tile)
    even, odd = torch.zeros(2, 16, 16, dtype=torch.float64)
    for pair in range(0, 32, 2):
        even = flushed(even + left[:, pair, None] * right[pair])
        odd = flushed(odd + left[:, pair + 1, None] * right[pair + 1])
    expected = flushed(sums + flushed(even + odd))
    found = tile_step(libraries["amx_bf16_emulated"].result(), *tile)
    assert torch.equal(bits(found), bits(expected.float()))


@pytest.mark.skipif("amx_bf16" not in SETS, reason="needs a processor with AMX and bfloat16, and Linux's permission")
class TestHardware:
    """What the tiles in software cannot show."""

    @pytest.fixture
    def hardware(self, libraries) -> ctypes.CDLL:
        return libraries["amx_bf16"].result()

    @pytest.fixture(autouse=True)
    def served_by_tiles(self, monkeypatch):
        monkeypatch.setenv("CONVIT_KERNELS_ISA", "amx_bf16")

    def attend(self) -> list[Tensor]:
        torch.manual_seed(1)
        inputs = make_inputs(2, 2, (14, 14), 40, torch.bfloat16)
        return with_gradients(lambda i: ck.gpsa_attention(*i[:5], grid_size=(14, 14), backend="cpu"), inputs)

    @pytest.mark.parametrize("kind", TILES)
    def test_the_same_bits_as_in_software(self, kind, tile, hardware, libraries):
        software = libraries["amx_bf16_emulated"].result()
        assert torch.equal(bits(tile_step(hardware, *tile)), bits(tile_step(software, *tile)))

    @pytest.mark.parametrize("tile_rows", [0, 5])
    def test_the_tile_configuration_is_as_found(self, tile_rows, hardware):
        """None, or another's."""
        configuration, found, none = bytearray(64), ctypes.create_string_buffer(64), bytes(64)
        if tile_rows:
            configuration[0] = 1  # the palette
            configuration[16], configuration[48] = 20, tile_rows  # bytes of a row of the first tile, and its rows
        hardware.load_configuration(bytes(configuration))
        try:
            self.attend()
            hardware.store_configuration(found)
        finally:
            hardware.load_configuration(none)
        assert found.raw == bytes(configuration)

    def test_torch_s_own_products_by_tiles_go_on(self):
        """ATen remembers for each thread what it configured."""
        left, right = torch.randn(2, 256, 256).to(torch.bfloat16)
        before = left @ right
        ours = self.attend()
        assert torch.equal(left @ right, before)
        assert all(torch.equal(a, b) for a, b in zip(self.attend(), ours, strict=True))

    def test_more_threads_than_cores(self):
        """What tiles hold survives that a thread is put aside."""
        threads = 4 * (os.cpu_count() or 1)
        expected = self.attend()[0]
        with ThreadPoolExecutor(threads) as pool:
            inputs = make_inputs(1, 1, (14, 14), 48, torch.bfloat16)
            results = list(
                pool.map(
                    lambda _: ck.gpsa_attention(*inputs[:5], grid_size=(14, 14), backend="cpu"), range(8 * threads)
                )
            )
        assert all(torch.equal(result, results[0]) for result in results)
        assert torch.equal(self.attend()[0], expected)

    def test_a_forked_process_has_tiles_too(self):
        program = """
import os, torch, convit_kernels as ck
torch.set_num_threads(1)
q = torch.randn(1, 2, 49, 40).to(torch.bfloat16)
attend = lambda: ck.gpsa_attention(q, q, q, torch.randn(2, 3) * 0, torch.zeros(2), backend="cpu")
before = attend()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(attend(), before) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
        subprocess.run([sys.executable, "-c", program], check=True)
