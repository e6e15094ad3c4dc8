"""Installs the wheel of dist/ beside other versions, with no compiler in reach, and runs the sdist's tests on it.

    python tools/dist_test.py                     all of ENVIRONMENTS, and the sdist's build: downloads gigabytes
    python tools/dist_test.py torch-2.13 sdist    these

An environment whose Python is not on this machine is skipped, and said to be.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
FOLDER = ROOT / "build" / "dist-test"
SDIST = "sdist"  # not an environment: the sdist is built and its tests are collected
HELPERS = ("numpy<2.4", "pytest")  # with a newer NumPy the interpreter of Triton 3.6 fails


class Run(NamedTuple):
    """Tests that the wheel must pass with these packages: names of their files, and which of them are left out."""

    packages: tuple[str, ...]
    tests: tuple[str, ...]
    # What torch.compile writes needs a compiler. The units' code is the same beside every torch: of the tests that run
    # once for each of them those of one are enough.
    less: str = "inductor or compiled_code or avx2 or avx512 or amx_bf16"


class Environment(NamedTuple):
    """Versions that the wheel is tried beside."""

    python: str
    torch: tuple[str, ...]
    runs: tuple[Run, ...]


ALONE = Run((), ("attention*", "cpu_attention", "cpu_memory", "extension", "positions", "relpos"))
TIMM = Run(
    ("timm==1.0.31", "scikit-learn"),
    (*ALONE.tests, "cli*", "compile", "export", "flops", "func", "gpsa", "models", "replace*", "timm*"),
)
# The oldest that the models take. Its own layer, which tests compare with, has neither float64 nor the meta device.
OLD_TIMM = Run(
    ("timm==1.0.16",),
    ("models",),
    "TestAgainstTimm and (every_gradient or intermediates or real_sizes) or timm_s",
)
ENVIRONMENTS = {
    "torch-2.10": Environment("3.12", ("torch==2.10.0", "torchvision==0.25.0"), (TIMM, OLD_TIMM)),
    # A CPU build of torch has no torchvision on PyPI, so timm cannot be imported beside it.
    "torch-2.13": Environment("3.11", ("torch==2.13.0",), (ALONE,)),
    "torch-2.14": Environment("3.11", ("torch==2.14.1", "torchvision==0.29.1"), (TIMM, OLD_TIMM)),
}


def python(version: str) -> str | None:
    """A Python of this version: the one on PATH, or one that pyenv keeps and shows only when it is named."""
    candidates = [f"python{version}"]
    if shutil.which("pyenv"):
        kept = subprocess.run(
            ["pyenv", "versions", "--bare"], capture_output=True, text=True, check=False
        ).stdout.split()
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False).stdout.strip()
        candidates += [f"{root}/versions/{name}/bin/python" for name in kept if name.startswith(f"{version}.")]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    return None


def run(*command: str | Path, cwd: Path = ROOT, environment: Mapping[str, str] | None = None) -> None:
    """A command that ends the program where it fails."""
    print("+", *command, flush=True)
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | dict(environment or {}), check=False)
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {' '.join(map(str, command))}")


def unpacked(name: str) -> Path:
    """The sdist's files in a folder of this name, as someone who has only it finds them."""
    (sdist,) = DIST.glob("*.tar.gz")
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(FOLDER / name, filter="data")
    (folder,) = (FOLDER / name).iterdir()
    return folder


def check_sdist() -> None:
    """Its tests are all found, and it builds in isolation: with a torch that pip installs for the build alone."""
    folder = unpacked(SDIST)
    run(sys.executable, "-m", "pytest", "--collect-only", "-qq", "tests", cwd=folder)
    run(
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-qq",
        "tests/interpreted",
        cwd=folder,
        environment={"TRITON_INTERPRET": "1"},
    )
    constraints = FOLDER / "constraints.txt"
    constraints.write_text("torch==2.13.0\n")
    wheels = FOLDER / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    limits = {"PIP_CONSTRAINT": str(constraints), "PIP_BUILD_CONSTRAINT": str(constraints)}
    wish = {"CONVIT_KERNELS_CPU": "1", "CONVIT_KERNELS_CUDA": "0"}
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels)
    run(*pip, next(DIST.glob("*.tar.gz")), environment=limits | wish)
    print(f"built in isolation: {next(wheels.glob('*.whl')).name}")


def check_wheel(name: str) -> None:
    """The wheel in a new environment; the tests stand in a folder that has no package to import instead of it."""
    environment = ENVIRONMENTS[name]
    interpreter = python(environment.python)
    if interpreter is None:
        print(f"{name}: skipped, no Python {environment.python} on this machine")
        return
    venv = FOLDER / name
    run(interpreter, "-m", "venv", "--clear", venv)
    own = venv / "bin" / "python"
    pip = (own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    no_compiler = {"PATH": str(venv / "bin"), "CC": "false", "CXX": "false"}
    (wheel,) = DIST.glob("*.whl")
    run(*pip, *environment.torch, *HELPERS)
    run(*pip, f"{wheel}[cli]", environment=no_compiler)
    tree = unpacked(f"{name}-tests")
    shutil.rmtree(tree / "convit_kernels")
    program = "import convit_kernels as ck; print(ck.__version__, ck.__file__); assert 'site-packages' in ck.__file__"
    run(own, "-W", "error::RuntimeWarning", "-c", program, cwd=tree, environment=no_compiler)
    run(own, "-m", "convit_kernels", "info", cwd=tree, environment=no_compiler)
    for packages, tests, less in environment.runs:
        if packages:
            run(*pip, *packages, environment=no_compiler)
        files = [path for test in tests for path in sorted(tree.glob(f"tests/test_{test}.py"))]
        run(own, "-m", "pytest", "-q", "-k", f"not ({less})", *files, cwd=tree, environment=no_compiler)
    shutil.rmtree(venv)


def main() -> None:
    known = [*ENVIRONMENTS, SDIST]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    names = parser.parse_args().names or known
    if unknown := set(names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: known are {', '.join(known)}")
    for name in names:
        if name == SDIST:
            check_sdist()
        else:
            check_wheel(name)


if __name__ == "__main__":
    main()
