"""Programs that PyTorch writes down: torch.export and what builds on it, torch.jit.trace; not torch.jit.script."""

import contextlib
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from backends import FAST
from equivalence import make_inputs
from timm.models import convit
from torch import Tensor, nn

import convit_kernels as ck
from convit_kernels import models

SMALL = {"patch_size": 8, "depth": 2, "num_heads": 4, "local_up_to_layer": 1, "num_classes": 5}
AUTO, DYNAMIC = torch.export.Dim.AUTO, torch.export.Dim.DYNAMIC


def perturbed(model: nn.Module) -> nn.Module:
    """With gates and positions of its own in each head."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gating" in name or "pos_proj.weight" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


class Attention(nn.Module):
    """One call of gpsa_attention."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.pos_weight, self.gate = (nn.Parameter(tensor) for tensor in make_inputs(1, 2, (3, 4), 8)[3:5])

    def forward(self, x: Tensor) -> Tensor:
        return ck.gpsa_attention(x, x + 1, x - 1, self.pos_weight, self.gate, grid_size=(3, 4), backend=self.backend)


def timm_model() -> nn.Module:
    return perturbed(convit.ConVit(img_size=32, embed_dim=8, **SMALL))  # its embed_dim is that of a head


def replaced() -> nn.Module:
    model = timm_model()
    ck.replace_gpsa(model)
    return model


def ours(img_size=32, **options) -> nn.Module:
    return perturbed(models.ConViT(img_size=img_size, embed_dim=32, **(SMALL | options)))


class Case(NamedTuple):
    model: nn.Module
    shape: tuple[int, ...]

    def inputs(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, *self.shape)


CASES = {
    "gpsa_attention": lambda: Case(Attention(), (2, 12, 8)),
    "GPSA": lambda: Case(perturbed(ck.GPSA(32, 4)), (16, 32)),
    "a replaced model": lambda: Case(replaced(), (3, 32, 32)),
    "ck.models": lambda: Case(ours(), (3, 32, 48)),
    "GPSA with dropout in training": lambda: Case(ck.GPSA(32, 4, attn_drop=0.5).train(), (16, 32)),
}
EACH_CASE = pytest.mark.parametrize("case", CASES)
WITHOUT_DROPOUT = pytest.mark.parametrize("case", list(CASES)[:4])


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """The namespaces of the operators in a program, without Python's own on its sizes."""
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {target.namespace for target in calls if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.situation(
    "Exporting",
    "`torch.export`, strict or not, for any batch size, of a model in training or not",
    timm="PyTorch's operators alone",
    ours="PyTorch's operators alone, the same outputs",
)
@EACH_CASE
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_pytorch_s_operators_alone(case, strict):
    model, x = CASES[case]()[0], CASES[case]().inputs()
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: DYNAMIC},))
    assert operators(program) == {"aten"}
    if not model.training:
        for batch in (2, 5):
            x = CASES[case]().inputs(batch)
            torch.testing.assert_close(program.module()(x), model(x))


def test_timm_s_does_too():
    program = torch.export.export(timm_model(), (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: DYNAMIC},))
    assert operators(program) == {"aten"}


@pytest.mark.parametrize("backend", FAST)
def test_a_backend_that_is_named_stays(backend):
    if backend == "triton":
        pytest.skip("needs CUDA tensors: tests of a GPU have it")
    program = torch.export.export(Attention(backend), (torch.randn(2, 2, 12, 8),))
    assert ("convit_kernels" in operators(program)) == (backend == "cpu")


ALONE = """
import sys

class Forbidden:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("convit_kernels", "timm"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Forbidden())
import torch

load, program, inputs, outputs = sys.argv[1:]
run = torch.export.load(program).module() if load == "export" else torch._inductor.aoti_load_package(program)
with torch.no_grad():
    for x, out in zip(torch.load(inputs), torch.load(outputs), strict=True):
        torch.testing.assert_close(run(x), out)
assert not any("convit" in name for name in torch._C._dispatch_get_all_op_names())
"""


def runs_alone(load, program, model, inputs, tmp_path) -> None:
    """Runs a saved program in a process that can import neither this package nor timm."""
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        torch.save([model(x) for x in inputs], tmp_path / "outputs.pt")
    arguments = load, program, tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    done = subprocess.run([sys.executable, "-c", ALONE, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.situation(
    "Exporting",
    "a program saved by `torch.export.save`, run where the package is not installed",
    timm="runs",
    ours="runs",
)
def test_a_saved_program_runs_where_the_package_is_not(tmp_path):
    model = replaced()
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: DYNAMIC},))
    torch.export.save(program, tmp_path / "program.pt2")
    inputs = [torch.randn(batch, 3, 32, 32) for batch in (2, 5)]
    runs_alone("export", tmp_path / "program.pt2", model, inputs, tmp_path)


@pytest.mark.situation(
    "Exporting",
    "AOTInductor (`aoti_compile_and_package`), any batch size, run where the package is not installed",
    timm="runs",
    ours="runs",
)
def test_aotinductor(tmp_path):
    layer = perturbed(ck.GPSA(32, 4))
    program = torch.export.export(layer, (torch.randn(2, 16, 32),), dynamic_shapes=({0: DYNAMIC},))
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "layer.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # a third of the time
    )
    runs_alone("inductor", package, layer, [torch.randn(batch, 16, 32) for batch in (2, 5)], tmp_path)


class TestSizes:
    """Exported once, for images of many sizes."""

    @pytest.mark.situation(
        "Exporting",
        "`torch.export` for any height and width of the image",
        timm="refused: one size",
        ours="`ck.models`: any that divides into patches, square or not",
    )
    @pytest.mark.parametrize(("made_for", "strict"), [((32, 32), False), ((32, 48), True)])
    def test_any_height_and_width(self, made_for, strict):
        model, example = ours(made_for), torch.randn(2, 3, 32, 48)
        rows, columns = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("columns", min=2, max=64)
        sizes = {0: DYNAMIC, 2: 8 * rows, 3: 8 * columns}
        program = torch.export.export(model, (example,), strict=strict, dynamic_shapes=(sizes,))
        assert operators(program) == {"aten"}
        run = program.module()
        for size in ((2, 32, 48), (3, 48, 32), (2, 32, 32), (2, 16, 80)):
            images = torch.randn(size[0], 3, *size[1:])
            torch.testing.assert_close(run(images), model(images))
        with pytest.raises(AssertionError, match="Guard failed"):
            run(torch.randn(2, 3, 32, 44))
        with pytest.raises(torch._dynamo.exc.UserError):
            torch.export.export(timm_model(), (torch.randn(2, 3, 32, 32),), dynamic_shapes=({2: DYNAMIC, 3: DYNAMIC},))

    def test_a_stem_of_convolutions(self):
        model = ours(stem="conv")
        program = torch.export.export(model, (torch.randn(2, 3, 32, 48),), dynamic_shapes=({2: AUTO, 3: AUTO},))
        images = torch.randn(2, 3, 48, 24)
        torch.testing.assert_close(program.module()(images), model(images))

    def test_another_size_than_timm_s_model_was_made_for(self):
        model = timm_model()
        model.patch_embed.set_input_size(img_size=(40, 40))
        model.pos_embed = nn.Parameter(torch.randn(1, 25, 32))
        images = torch.randn(2, 3, 40, 40)
        expected = torch.export.export(model, (images,)).module()(images)
        ck.replace_gpsa(model)
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)

    @pytest.mark.situation(
        "Exporting",
        "`torch.export` of the layer alone for any number of tokens",
        timm="refused: one number",
        ours="any square number",
    )
    @pytest.mark.parametrize("strict", [False, True])
    def test_any_square_number_of_tokens(self, strict):
        layer, sizes = perturbed(ck.GPSA(32, 4)), {0: DYNAMIC, 1: DYNAMIC}
        run = torch.export.export(layer, (torch.randn(2, 16, 32),), strict=strict, dynamic_shapes=(sizes,)).module()
        for tokens in (16, 25, 4):
            x = torch.randn(3, tokens, 32)
            torch.testing.assert_close(run(x), layer(x))
        with pytest.raises(AssertionError, match="Guard failed"):
            run(torch.randn(3, 18, 32))
        with pytest.raises(torch._dynamo.exc.UserError):
            torch.export.export(convit.GPSA(32, 4), (torch.randn(2, 16, 32),), dynamic_shapes=(sizes,))


class TestOnnx:
    """What onnxruntime makes of these files is in tests/tools; here: that no node is of another domain than ONNX's."""

    @pytest.fixture(autouse=True)
    def needs_onnx(self):
        for name in ("onnx", "onnxscript"):
            pytest.importorskip(name, reason=f"needs {name}, which make test-tools installs")

    @pytest.mark.parametrize("dynamo", [True, False])
    @WITHOUT_DROPOUT
    def test_holds_onnx_s_operators_alone(self, case, dynamo, tmp_path):
        import onnx

        model, x = CASES[case]()[0], CASES[case]().inputs()
        if case == "ck.models" and not dynamo:
            x = torch.randn(2, 3, 32, 32)  # TorchScript's exporter has no antialiased interpolation
        sizes = {"dynamic_shapes": ({0: DYNAMIC},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
        with torch.no_grad():
            torch.onnx.export(model, (x,), tmp_path / "model.onnx", input_names=["x"], dynamo=dynamo, **sizes)
        program = onnx.load(tmp_path / "model.onnx")
        assert {node.domain for node in program.graph.node} == {""}
        assert {function.domain for function in program.functions} <= {"pkg.onnxscript.torch_lib.common"}


def traced(model: nn.Module, x: Tensor, gradients: bool = False) -> nn.Module:
    with torch.set_grad_enabled(gradients):
        return torch.jit.trace(model, x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
class TestTrace:
    @pytest.mark.situation(
        "Exporting",
        "`torch.jit.trace`, with gradients enabled or not; then another batch size, and gradients",
        timm="fails its own check the first time",
        ours="works",
    )
    @pytest.mark.parametrize("gradients", [False, True])
    @WITHOUT_DROPOUT
    def test_runs_with_another_batch_and_gives_gradients(self, case, gradients):
        model, x = CASES[case]()[0], CASES[case]().inputs()
        program = traced(model, x, gradients)
        assert "convit_kernels::" not in str(program.inlined_graph)
        x = CASES[case]().inputs(5)
        torch.testing.assert_close(program(x), model(x))
        parameters = dict(model.named_parameters())
        for run in (program, model):
            grads = torch.autograd.grad(run(x).square().sum(), list(parameters.values()))
            if run is program:
                found = grads
        for name, mine, truth in zip(parameters, found, grads, strict=True):
            torch.testing.assert_close(mine, truth, msg=lambda text, name=name: f"{name}: {text}", rtol=1e-4, atol=1e-5)

    def test_timm_s_fails_its_own_check(self):
        with pytest.raises(torch.jit.TracingCheckError):
            traced(timm_model(), torch.randn(2, 3, 32, 32))

    @pytest.mark.parametrize("tokens", [1, 16])
    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_another_number_of_tokens_is_an_error(self, tokens, backend):
        program = traced(perturbed(ck.GPSA(32, 4, backend=backend)), torch.randn(2, 9, 32))
        with pytest.raises(RuntimeError):
            program(torch.randn(2, tokens, 32))

    @pytest.mark.situation(
        "Exporting",
        "a traced model, given an image of another shape with as many patches",
        timm="wrong in silence",
        ours="`ck.models`: an error",
    )
    @pytest.mark.parametrize("made_for", [(32, 32), (16, 64)])
    def test_an_image_of_another_shape_is_an_error(self, made_for):
        program = traced(ours(made_for), torch.randn(2, 3, 16, 64))
        for size in ((64, 16), (32, 32), (16, 72)):
            with pytest.raises(RuntimeError, match="must match the existing size"):
                program(torch.randn(2, 3, *size))
        theirs = timm_model()
        theirs(torch.randn(2, 3, 32, 32))  # makes the positions that a trace would otherwise fail its check for
        assert traced(theirs, torch.randn(2, 3, 32, 32))(torch.randn(2, 3, 16, 64)).shape == (2, 5)

    @pytest.mark.skipif("cpu" not in FAST, reason="needs the built library; the CI builds it")
    def test_a_backend_that_is_named_stays_or_is_refused(self):
        layer, x = perturbed(ck.GPSA(32, 4, backend="cpu")), torch.randn(2, 16, 32)
        program = traced(layer, x)
        assert "convit_kernels::gated_attention" in str(program.inlined_graph)
        torch.testing.assert_close(program(x), layer(x))
        with pytest.raises(RuntimeError, match="trace cannot write down the derivatives"):
            traced(layer, x, gradients=True)


def calls_gpsa_attention(x: Tensor, pos_weight: Tensor, gate: Tensor) -> Tensor:
    return ck.gpsa_attention(x, x, x, pos_weight, gate)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
class TestScript:
    @pytest.mark.situation(
        "Exporting",
        "`torch.jit.script`",
        timm="compiles",
        ours="refused at once; the text names `torch.compile`, `torch.export` and `torch.jit.trace`",
    )
    @pytest.mark.parametrize(
        "what",
        [
            lambda: ck.GPSA(32, 4),
            replaced,
            ours,
            lambda: ours(local_up_to_layer=0),
            lambda: ours().blocks[1],
            lambda: calls_gpsa_attention,
            lambda: ck.gpsa_attention,
        ],
        ids=["GPSA", "replaced", "ck.models", "a DeiT", "a block", "a function", "gpsa_attention"],
    )
    def test_is_refused_with_the_way_out(self, what):
        with pytest.raises(RuntimeError, match=r"take torch\.compile, or torch\.export or torch\.jit\.trace"):
            torch.jit.script(what())

    def test_timm_s_compiles(self):
        torch.jit.script(timm_model())

    def test_a_model_is_whole_after_it_was_refused(self):
        model, x = replaced(), torch.randn(2, 3, 32, 32)
        before = model(x)
        with contextlib.suppress(RuntimeError):
            torch.jit.script(model)
        assert torch.equal(model(x), before)
