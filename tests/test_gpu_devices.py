"""What runs on GPUs of which none is here: told to torch, as far as the recorded launch or the composite's output."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run_program
from torch import Tensor
from torch._subclasses import FakeTensorMode

import convit_kernels as ck
from convit_kernels import attention, extension
from convit_kernels.backends import triton as backend
from convit_kernels.cli.info import native_libraries
from convit_kernels.inputs import Inputs
from convit_kernels.triton import configs
from convit_kernels.triton.configs import Config

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be recorded", allow_module_level=True)

from convit_kernels.triton.backward import backward
from convit_kernels.triton.common import padded
from convit_kernels.triton.forward import forward
from tools.machine_code.compiled import DEVICES, Launch, recorded_launches

KIB = 1024
PACKAGE = Path(ck.__file__).parent
Told = Callable[..., None]


def nvidia(major: int, minor: int, shared_kib: int, multiprocessors: int = 100) -> SimpleNamespace:
    return SimpleNamespace(
        name=f"a GPU of sm_{major}{minor}",
        major=major,
        minor=minor,
        shared_memory_per_block_optin=shared_kib * KIB,
        multi_processor_count=multiprocessors,
        L2_cache_size=1 << 26,
    )


def amd(architecture: str, shared_kib: int = 64, multiprocessors: int = 100) -> SimpleNamespace:
    return SimpleNamespace(
        name=f"a GPU of {architecture}",
        gcnArchName=f"{architecture}:sramecc+:xnack-",
        shared_memory_per_block=shared_kib * KIB,
        multi_processor_count=multiprocessors,
        L2_cache_size=1 << 26,
    )


T4 = nvidia(7, 5, 64, 40)
H100 = nvidia(9, 0, 227, 132)


def forget() -> None:
    configs.clear()
    for remembered in (backend.why_not_on, backend._warned_of, backend._why_not_with):
        remembered.cache_clear()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Told]:
    """Makes torch tell of these GPUs. Nothing is on them: no CUDA is initialised."""
    monkeypatch.setenv("CONVIT_KERNELS_CACHE_DIR", str(tmp_path))

    def tell(*gpus: SimpleNamespace) -> None:
        forget()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpus[getattr(device, "index", device)].name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (gpus[index].major, gpus[index].minor))
        monkeypatch.setattr(torch.version, "hip", "7.0" if hasattr(gpus[0], "gcnArchName") else None)

    yield tell
    forget()


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton that compiles for what this one does not know yet."""
    monkeypatch.setattr(backend, "_why_not_compiled", lambda architecture: "")


class OnGpu(Tensor):
    """One that says it is on a GPU, and is computed with on the CPU."""

    device = torch.device("cuda", 0)
    is_cuda = True


class OnXpu(Tensor):
    device = torch.device("xpu", 0)


def tensors(dtype: torch.dtype = torch.float32, kind: type[Tensor] = OnGpu) -> list[Tensor]:
    """q, k, v, pos_weight and gate of two heads and 3 x 4 tokens."""
    torch.manual_seed(0)
    made = [*torch.randn(3, 2, 2, 12, 16).to(dtype), torch.randn(2, 3), torch.randn(2)]
    return [tensor.as_subclass(kind) for tensor in made]


def inputs(dtype: torch.dtype = torch.float32, kind: type[Tensor] = OnGpu) -> Inputs:
    return Inputs(*tensors(dtype, kind), grid=(3, 4), scale=0.25, dropout_p=0.0)


def launched(
    dtype: torch.dtype, batch: int = 128, heads: int = 9, head_dim: int = 48, side: int = 14
) -> dict[str, Launch]:
    """The launches of forward and backward, by kernel, for tensors on the GPU that torch tells of."""
    tokens = side * side
    with FakeTensorMode(), recorded_launches() as recorded:
        q, k, v, d_out = (torch.empty(batch, heads, tokens, head_dim, dtype=dtype, device="cuda:0") for _ in range(4))
        gate, pos_weight = torch.empty(heads, device="cuda:0"), torch.empty(heads, 3, device="cuda:0")
        table = torch.empty(heads, tokens, padded(tokens), dtype=dtype, device="cuda:0")
        out, lse, content = forward(q, k, v, gate, (side, side), 1.0, table=table, need_grad=True)
        assert out.device.type == "cuda" and lse is not None and content is not None
        backward(d_out, q, k, v, content, lse, pos_weight, gate, (side, side), 1.0, table=table)
    return {launch.name.removesuffix("_kernel"): launch for launch in recorded}


def tile(launch: Launch) -> Config:
    values, options = launch.arguments, launch.options
    return Config(values["BLOCK_M"], values["BLOCK_N"], options["num_warps"], options["num_stages"])


def of_family(name: str, dtype: torch.dtype) -> dict[str, Config]:
    return {
        one: configs.table_config(one, dtype=dtype, head_dim=48, regime="dense", family_name=name)
        for one in configs.PASSES
    }


def assert_runs_with_the_tiles_of(name: str, dtype: torch.dtype) -> None:
    assert attention.fastest(inputs(dtype)) == "triton"
    launches = launched(dtype)
    assert {one: tile(launches[one]) for one in configs.PASSES} == of_family(name, dtype)


def assert_runs_the_composite(dtype: torch.dtype, reason: str) -> None:
    """With the right output, and the reason for whoever asks."""
    assert reason in attention.why_not("triton", inputs(dtype))
    assert attention.fastest(inputs(dtype)) == "composite"
    q, k, v, pos_weight, gate = tensors(dtype, kind=Tensor)
    found = ck.gpsa_attention(*tensors(dtype), grid_size=(3, 4))
    wanted = ck.gpsa_attention(
        q.double(), k.double(), v.double(), pos_weight, gate, grid_size=(3, 4), backend="reference"
    )
    torch.testing.assert_close(found.as_subclass(Tensor).double(), wanted, rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match=r"backend=None would take 'composite'|cannot run here"):
        ck.gpsa_attention(*tensors(dtype), grid_size=(3, 4), backend="triton")


# ---- Triton ----------------------------------------------------------------------------------------------------------


def test_a_t4_has_tiles_of_its_own_in_float32(told: Told) -> None:
    told(T4)
    assert_runs_with_the_tiles_of("sm_75", torch.float32)
    assert configs.family(torch.device("cuda", 0)) == "sm_75"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_t4_leaves_halves_to_pytorch_which_has_its_tensor_cores(told: Told, dtype: torch.dtype) -> None:
    told(T4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # this is the best way, nothing is amiss
        assert_runs_the_composite(dtype, f"the kernels take no {dtype} on sm_75")
    with pytest.raises(RuntimeError, match=f"the kernels take no {dtype} on sm_75"):
        launched(dtype)


def test_the_largest_heads_do_not_fit_a_t4(told: Told) -> None:
    told(T4)
    q = torch.randn(1, 1, 4, 193).as_subclass(OnGpu)
    large = Inputs(q, q, q, torch.randn(1, 3), torch.randn(1), grid=(2, 2), scale=1.0, dropout_p=0.0)
    assert attention.why_not("triton", large) == "head_dim is at most 192 on sm_75, not 193"
    assert attention.fastest(large) == "composite"


def test_float32_on_rdna_goes_to_the_composite(told: Told) -> None:
    told(amd("gfx1201"))
    assert_runs_the_composite(torch.float32, "the kernels take no torch.float32 on gfx1200")


@pytest.mark.parametrize(
    ("gpu", "family"),
    [
        (nvidia(13, 1, 227), "sm_120"),
        (nvidia(11, 0, 227), "sm_100"),  # newer than 10.3, and none of 12.x
        (nvidia(10, 5, 99), "sm_86"),  # what is nearer needs more shared memory
        (amd("gfx90a"), "gfx90a"),
        (amd("gfx960", 160), "gfx950"),
        (amd("gfx960", 64), "gfx942"),
        (amd("gfx1201"), "gfx1200"),
        (amd("gfx1250", 320), "gfx1200"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.usefixtures("compiles")
def test_an_unknown_gpu_takes_the_newest_tiles_that_fit(told: Told, gpu: SimpleNamespace, family: str) -> None:
    told(gpu)
    assert_runs_with_the_tiles_of(family, torch.bfloat16)


@pytest.mark.parametrize("gpu", [nvidia(6, 1, 48), nvidia(7, 0, 96), amd("gfx906"), amd("gfx1100"), nvidia(13, 1, 48)])
@pytest.mark.usefixtures("compiles")
def test_a_gpu_older_or_smaller_than_all_tiles_runs_the_composite(told: Told, gpu: SimpleNamespace) -> None:
    told(gpu)
    with pytest.warns(RuntimeWarning, match="runs without its Triton kernels"):
        assert_runs_the_composite(torch.float32, "no launch configurations")
    with pytest.raises(RuntimeError, match="no launch configurations"):
        launched(torch.float32)


@pytest.mark.parametrize("gpu", [nvidia(13, 1, 227), amd("gfx960", 160)], ids=lambda gpu: gpu.name)
def test_what_triton_cannot_compile_for_is_told_once(told: Told, gpu: SimpleNamespace) -> None:
    """Asked of the installed Triton, in a process that may die of it."""
    told(gpu)
    with pytest.warns(RuntimeWarning, match=f"without its Triton kernels: Triton cannot compile for {gpu.name[9:]}"):
        assert_runs_the_composite(torch.float32, "Triton cannot compile for")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_runs_the_composite(torch.bfloat16, "Triton cannot compile for")
    (of_triton,) = [one for one in attention.backends() if one.name == "triton"]
    assert not of_triton.available and "Triton cannot compile for" in of_triton.reason


def test_one_gpu_that_can_is_enough_for_the_machine(told: Told) -> None:
    told(nvidia(6, 1, 48), H100)
    assert attention.why_not("triton") == ""
    assert backend.why_not_on(0) and not backend.why_not_on(1)


def test_a_gpu_that_is_known_is_not_tried_by_compiling(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    told(H100)
    monkeypatch.setattr(backend, "_why_not_compiled", lambda architecture: pytest.fail("it takes two seconds"))
    assert attention.fastest(inputs(torch.bfloat16)) == "triton"


def test_the_question_is_answered_when_torch_compile_traces(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    told(T4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or the compiler would look for it, too

    @torch.compile(fullgraph=True, backend="eager")
    def answered(x: Tensor) -> Tensor:
        return x + 1 if backend._why_not_there(0, x.dtype, 48) else x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answered(torch.zeros(1, dtype=torch.float16)) == 1
        assert answered(torch.zeros(1)) == 0


def test_gpus_of_intel_and_apple_run_the_composite() -> None:
    assert "others run the composite" in attention.why_not("triton", inputs(kind=OnXpu))
    assert attention.fastest(inputs(kind=OnXpu)) == "composite"


def test_the_shared_memory_of_a_family_is_that_of_its_smallest_device() -> None:
    for family, shared_memory in configs.SHARED_MEMORY.items():
        members = [device for device, of in configs.FAMILIES.items() if of == family and device in DEVICES]
        assert members and shared_memory == min(DEVICES[device].shared_per_block for device in members)


# ---- tiles by the number of programs ---------------------------------------------------------------------------------


def test_few_programs_have_finer_tiles(told: Told) -> None:
    """Batch 8 with 9 heads of 196 tokens are 144 programs of 128 rows, on 132 multiprocessors."""
    told(H100)
    many, few = launched(torch.bfloat16, batch=128), launched(torch.bfloat16, batch=8)
    assert tile(many["forward"]) == Config(128, 32, 8, 2) and tile(few["forward"]) == Config(64, 32, 4, 2)
    assert tile(many["backward_q"]) == Config(128, 32, 8, 2) and tile(few["backward_q"]) == Config(64, 32, 4, 2)
    assert tile(many["backward_kv"]) == Config(32, 128, 8, 2) and tile(few["backward_kv"]) == Config(32, 64, 4, 2)
    assert tile(many["backward_position"]) == tile(few["backward_position"])
    assert many["forward"].grid == (2 * 128, 9) and few["forward"].grid == (4 * 8, 9)


@pytest.mark.parametrize(("multiprocessors", "few"), [(72, False), (73, True)])
def test_few_are_less_than_two_a_multiprocessor(told: Told, multiprocessors: int, few: bool) -> None:
    told(nvidia(9, 0, 227, multiprocessors))
    assert configs.few_programs(196, 72, torch.device("cuda", 0)) == few


def test_a_finer_tile_does_half_the_work_by_half_the_warps() -> None:
    for (_, coarse), fine in configs.FINER.items():
        assert coarse.block_m * coarse.block_n == 2 * fine.block_m * fine.block_n
        assert coarse.num_warps == 2 * fine.num_warps and coarse.num_stages == fine.num_stages


def test_what_was_tuned_for_few_programs_serves_few(told: Told) -> None:
    told(H100)

    def found(batch_heads: int) -> Config:
        return configs.lookup(
            "forward",
            dtype=torch.float16,
            head_dim=48,
            num_tokens=196,
            batch_heads=batch_heads,
            device=torch.device("cuda", 0),
        )

    before = found(1152), found(72)
    for batch_heads in (72, 1152):
        few = configs.few_programs(196, batch_heads, torch.device("cuda", 0))
        key = configs.entry_key("forward", dtype=torch.float16, head_dim=48, regime="dense", num_tokens=196, few=few)
        configs.store_tuned(H100.name, {key: Config(16, 16, 4, 1 + few)})
    assert before == (Config(128, 32, 8, 2), Config(64, 32, 4, 2))
    assert (found(1152), found(72)) == (Config(16, 16, 4, 1), Config(16, 16, 4, 2))
    with configs.target("sm_80"):  # not this device: its tuned configurations are not for it
        assert found(1152) == of_family("sm_80", torch.float16)["forward"]


def test_a_lookup_asks_torch_once(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    told(H100)
    first = launched(torch.bfloat16, batch=8)
    for name in ("get_device_properties", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("asked again"))
    again = launched(torch.bfloat16, batch=8)
    assert [tile(again[name]) for name in configs.PASSES] == [tile(first[name]) for name in configs.PASSES]


# ---- the CUDA library ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),  # machine code runs on what is newer in its generation
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("7.5", (7, 0), False),
        ("12.0+PTX", (12, 1), True),
        ("12.0+PTX", (13, 1), True),  # compiled when it is loaded
        ("12.0+PTX", (11, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f", (11, 0), False),
    ],
)
def test_for_which_gpus_there_is_code(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert extension._covers(built, capability) == runs


@pytest.fixture
def built_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bytes], None]:
    """Puts a library that was compiled for some architectures in place of the CUDA library, which need not be here."""

    def put(names: bytes) -> None:
        (tmp_path / "_C_cuda.abi3.so").write_bytes(b"\0convit_kernels architectures " + names + b"\0")
        monkeypatch.setattr(extension, "_HERE", tmp_path)
        monkeypatch.setattr(extension, "status", {"_C": None, "_C_cuda": None})

    return put


def test_a_gpu_without_cuda_code_is_told_once_with_the_way_out(told: Told, built_for: Callable[[bytes], None]) -> None:
    built_for(b"7.5 8.0 12.0+PTX")
    told(H100, nvidia(13, 1, 227), nvidia(7, 0, 96))
    with pytest.warns(RuntimeWarning, match=r"no code for a GPU of sm_90 \(sm_90\), only for 7\.5, 8\.0, 12\.0\+PTX"):
        assert extension.lacks_code()
    assert "TORCH_CUDA_ARCH_LIST=9.0" in native_libraries()["_C_cuda"]
    assert not extension.lacks_code()  # it is out of use already


def test_a_gpu_with_cuda_code_keeps_the_library(told: Told, built_for: Callable[[bytes], None]) -> None:
    built_for(b"7.5 8.0 9.0 12.0+PTX")
    told(H100, nvidia(8, 6, 99), nvidia(13, 1, 227))
    assert not extension.lacks_code()
    assert native_libraries()["_C_cuda"] == "in use"


WITHOUT_CODE = """
import torch
import convit_kernels as ck
from convit_kernels import extension, ops

assert torch.cuda._queued_calls and not torch.cuda.is_initialized()
(asked,) = [call for call, _ in torch.cuda._queued_calls if call is ops._without_cuda_code]

def kernel():
    (line,) = [line for line in torch._C._dispatch_dump("convit_kernels::dense_position_table").splitlines()
               if line.startswith("CUDA:")] or [""]
    return line

before = kernel()
extension.lacks_code = lambda: False
asked()
assert kernel() == before
extension.lacks_code = lambda: True
asked()
assert kernel() not in ("", before), kernel()
"""


def test_the_tables_go_back_to_pytorch_when_cuda_is_initialised() -> None:
    run_program(WITHOUT_CODE, PACKAGE.parent)


def test_importing_does_not_initialise_cuda() -> None:
    run_program(
        "import torch\n"
        "def fail(*_): raise AssertionError('CUDA')\n"
        "torch._C._cuda_init = torch._C._cuda_getDeviceCount = fail\n"
        "import convit_kernels as ck\n"
        "ck.GPSA(32, 4)(torch.randn(2, 16, 32))\n",
        PACKAGE.parent,
    )


def test_every_architecture_has_cuda_code(told: Told) -> None:
    told(H100)
    default: Any = (PACKAGE.parent / "setup.py").read_text().split('DEFAULT_ARCHITECTURES = "')[1].split('"')[0]
    for architecture in configs.FAMILIES:
        if architecture.startswith("sm_"):
            number = int(architecture[3:])
            assert any(extension._covers(name, divmod(number, 10)) for name in default.split()), architecture
