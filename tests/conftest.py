"""What every test runs under."""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from equivalence import shares

# For tools/, which is no part of the package. It comes last: what is tested may be another convit_kernels than the
# checkout's.
sys.path.append(str(Path(__file__).parents[1]))
if TYPE_CHECKING:
    from training.config import Options

collect_ignore = []
TOOLS = ("accelerate", "onnxruntime", "onnxscript", "opacus", "peft", "ptflops", "torchao", "torchinfo")
# Those tools are in an environment of their own. `make test-tools` fails where it collects nothing of the folder.
if not all(find_spec(name) for name in TOOLS):
    collect_ignore.append("tools")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=1, help="Run each test of equivalence with so many seeds.")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="What tests with a `device` run on.")


def pytest_configure(config: pytest.Config) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if config.getoption("--device") == "cpu":
        # Triton's interpreter is chosen for a whole process: those tests have one of their own.
        collect_ignore.extend([] if interpreted else ["interpreted"])
    elif interpreted:
        raise pytest.UsageError("--device cuda compiles the kernels, TRITON_INTERPRET=1 interprets them: leave out one")
    elif not (torch.cuda.is_available() or config.getoption("--collect-only")):
        raise pytest.UsageError("--device cuda: torch sees no GPU here; leave it out for the CPU")
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    seeds = metafunc.config.getoption("--seeds")
    if seeds > 1 and metafunc.definition.get_closest_marker("equivalence"):
        metafunc.parametrize("seed", range(seeds))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out, on a GPU, what a backend does not take there: `cpu` any tensor, `triton` float64."""
    if config.getoption("--device") == "cpu":
        return

    def refused(item: Any) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        taken = {"cpu": False, "triton": params.get("dtype") != torch.float64}.get(params.get("backend"), True)
        return "on_device" in item.fixturenames and not item.get_closest_marker("on_cpu") and not taken

    config.hook.pytest_deselected(items=list(filter(refused, items)))
    items[:] = [item for item in items if not refused(item)]


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_collection_finish() -> None:
    """What is imported by now stays: a test that collects garbage need not look through it, which takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed() -> int:
    return 0


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """What the tests of kernels that run anywhere put their tensors on: --device."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture
def on_device(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    """Tensors are made on --device, unless a test is marked `on_cpu` or names a device."""
    if device.type == "cpu" or request.node.get_closest_marker("on_cpu"):
        yield
    else:
        with device:
            yield


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["shares"] = shares


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Of several processes each has its part of the summary."""
    for name, found in getattr(node, "workeroutput", {}).get("shares", {}).items():
        shares[name] = max(tuple(found), shares.get(name, (0.0, "")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How near the results of the session came to what the rule of equivalence allows."""
    for name, (share, test) in sorted(shares.items(), key=lambda item: -item[1][0])[:3]:
        terminalreporter.write_line(f"{share:.2f} of what is allowed: {name} in {test.removesuffix(' (call)')}")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so that an output that a kernel does not write shows up."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def idx_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Fashion-MNIST's files with a data set that a tiny model learns in seconds."""
    from tiny_images import write_all  # needs the examples' libraries, which not every environment has

    return write_all(tmp_path_factory.mktemp("idx"))


@pytest.fixture
def small_canvases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cluttered images of the pictures of `idx_data`, which are small and few."""
    from tiny_images import SIZE
    from training import cluttered

    values = {"SIDE": SIZE, "CANVAS": 2 * SIZE, "FRAGMENT": 4, "TRAIN": 60, "TEST": 20}
    for name, value in values.items():
        monkeypatch.setattr(cluttered, name, value)


@pytest.fixture(scope="session")
def folder_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small pictures, with train/ and val/."""
    from tiny_images import write_folder

    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def options(idx_data: Path, tmp_path: Path) -> "Options":
    """A run of three epochs of twelve steps with a tiny model."""
    from tiny_runs import tiny_options

    return tiny_options(idx_data, tmp_path / "run")
