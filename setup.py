"""Builds the native extensions: `_C` (C++, the CPU) and `_C_cuda` (CUDA C++), each against the LibTorch stable ABI.

One build serves every torch >= 2.10 and Python >= 3.10. Neither extension is needed to install: whatever is missing on
this machine (torch, a compiler, nvcc) is named in the build's output, and the package then runs in pure PyTorch there.
pip shows that output only with -v, so REPORT goes into the package, for the first import to say what was not built.

Environment:
    CONVIT_KERNELS_CPU, CONVIT_KERNELS_CUDA   auto (the default), 0 (skip), 1 (fail when it cannot be built)
    CUDA_HOME                                 the CUDA toolkit, when it is not where nvcc says it is
    CONVIT_KERNELS_EMULATE                    1: those of AVX-512 and AMX are compiled for AVX2 as well, to test them
    TORCH_CUDA_ARCH_LIST                      for example "8.0;9.0+PTX"; default: see DEFAULT_ARCHITECTURES
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.partition(".")[0]) < 77:  # older ones know neither bdist_wheel nor the licence's name
    sys.exit(
        f"convit_kernels is built by setuptools 77 or newer; this is {setuptools.__version__}: "
        "pip install -U 'setuptools>=77', or install without --no-build-isolation"
    )

ROOT = Path(__file__).parent
PACKAGE = "convit_kernels"
REPORT = "_build.json"  # {library: reason} of those that could not be built, and of those that were not to be
TORCH_TARGET = "0x020a000000000000"  # torch 2.10, the oldest whose stable ABI has all that the sources use
PYTHON_TARGET = "0x030A0000"
DEFAULT_ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"
X86 = platform.machine() in ("x86_64", "AMD64")
# The attention's CPU kernels: one unit for each instruction set, chosen when they run, and the flags of each.
UNITS = {"csrc/attention/portable.cpp": []}
# With CONVIT_KERNELS_EMULATE=1 those that few processors have are compiled a second time, for any x86-64 with AVX2.
EMULATED: dict[str, list[str]] = {}
if X86:
    AVX2 = ["-mavx2", "-mfma", "-mf16c"]  # every processor with the first has the last
    AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    UNITS["csrc/attention/avx2.cpp"] = AVX2
    UNITS["csrc/attention/avx512.cpp"] = AVX512
    UNITS["csrc/attention/avx512_bf16.cpp"] = [*AVX512, "-mavx512bf16"]
    UNITS["csrc/attention/amx_bf16.cpp"] = [*AVX512, "-mavx512bf16"]  # AMX is in assembly, which needs no flag
    if os.environ.get("CONVIT_KERNELS_EMULATE") == "1":
        flags = [*AVX2, "-Wno-psabi", "-DCONVIT_EMULATED"]
        EMULATED = {f"csrc/attention/{name}.cpp": flags for name in ("avx512", "avx512_bf16", "amx_bf16")}


class CannotBuildError(Exception):
    """An extension cannot be built on this machine; the text says why."""


class NotWantedError(Exception):
    """An extension is not to be built; the text says by whose wish."""


def schemas() -> dict[str, object]:
    """The op schemas' module: NAMESPACE, and INTERFACE, a fingerprint without which the package loads no library."""
    return runpy.run_path(str(ROOT / PACKAGE / "schemas.py"))


def torch_folder() -> Path:
    try:
        import torch
    except ImportError as error:
        raise CannotBuildError(
            "torch is not importable in the build environment: install torch first, then use --no-build-isolation"
        ) from error
    return Path(torch.__file__).parent


def cuda_home() -> Path:
    """The CUDA toolkit's root. A wrapper script named nvcc may stand anywhere, so nvcc itself is asked."""
    if named := os.environ.get("CUDA_HOME"):
        if not (Path(named) / "bin" / "nvcc").exists():
            raise CannotBuildError(f"CUDA_HOME={named} has no bin/nvcc")
        return Path(named)
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    candidates = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc"]
    for nvcc in [*candidates, *sorted(map(str, site.glob("cu*/bin/nvcc")))]:
        if nvcc and Path(nvcc).exists():
            dryrun = subprocess.run([nvcc, "--dryrun", "probe.cu"], capture_output=True, text=True, check=False)
            if top := re.search(r"TOP=(\S+)", dryrun.stderr):
                return Path(top[1]).resolve()
    raise CannotBuildError("no nvcc found in CUDA_HOME, PATH, /usr/local/cuda, /opt/cuda or pip's nvidia packages")


ARCHITECTURE = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


def architectures(nvcc: Path) -> list[str]:
    """The names in TORCH_CUDA_ARCH_LIST, or those of the default list that this nvcc knows."""
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        names = asked.replace(";", " ").split()
        for name in names:
            if not ARCHITECTURE.fullmatch(name):
                raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST has {name!r}; give numbers such as 9.0 or 9.0+PTX")
        return names
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    names = DEFAULT_ARCHITECTURES.split()
    known = [name for name in names if f"compute_{name.removesuffix('+PTX').replace('.', '')}" in listing]
    if not known:
        raise CannotBuildError(f"this nvcc knows none of {' '.join(names)}")
    return known


def architecture_flags(names: list[str]) -> list[str]:
    """nvcc's -gencode flags for the architectures of these names."""
    flags = []
    for major, minor, variant, ptx in (ARCHITECTURE.fullmatch(name).groups() for name in names):
        number = f"{major}{minor}{variant}"
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def macros() -> list[tuple[str, str | None]]:
    ops = schemas()
    return [
        ("TORCH_TARGET_VERSION", TORCH_TARGET),
        ("Py_LIMITED_API", PYTHON_TARGET),
        ("CONVIT_KERNELS_NAMESPACE", str(ops["NAMESPACE"])),
        ("CONVIT_KERNELS_INTERFACE", f'"{ops["INTERFACE"]}"'),
        *([("CONVIT_KERNELS_X86", "1")] if X86 else []),
        *([("CONVIT_KERNELS_EMULATE", "1")] if EMULATED else []),
    ]


def extension(name: str, sources: list[str], **options: list[str]) -> Extension:
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    return Extension(
        f"{PACKAGE}.{name}",
        sources=sources,
        depends=[*headers, f"{PACKAGE}/schemas.py", *options.pop("depends", [])],
        define_macros=macros(),
        py_limited_api=True,
        language="c++",
        **options,
    )


class BuildNative(build_ext):
    """build_ext, where an extension that cannot be built is left out with a message instead of ending the install."""

    def run(self) -> None:
        self.report: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
        super().run()
        report = (ROOT if self.inplace else Path(self.build_lib)) / PACKAGE / REPORT
        report.unlink(missing_ok=True)
        if any(self.report.values()):
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(json.dumps(self.report, indent=1))

    def build_extensions(self) -> None:
        built = []
        for ext in self.extensions:
            knob = "CONVIT_KERNELS_CUDA" if ext.name.endswith("_cuda") else "CONVIT_KERNELS_CPU"
            wish = os.environ.get(knob, "auto")
            if wish not in ("auto", "0", "1"):
                raise SystemExit(f"{knob}={wish}: allowed are auto, 0 and 1")
            try:
                if wish == "0":
                    raise NotWantedError(f"{knob}=0")
                self.prepare(ext)
                self.build_extension(ext)
                built.append(ext)
            except Exception as error:  # a compiler can fail in any way, and none of them may stop the install
                if wish == "1":
                    raise
                self.remove_stale(ext)
                missing = isinstance(error, FileNotFoundError) and error.filename
                why = f"there is no {missing} on PATH" if missing else " ".join(str(error).split())
                kind = "skipped" if isinstance(error, NotWantedError) else "failed"
                self.report[kind][ext.name.rpartition(".")[2]] = why
                print(f"{PACKAGE}: not building {ext.name}: {why}", file=sys.stderr)
        self.extensions = built

    def prepare(self, ext: Extension) -> None:
        torch = torch_folder()
        include = torch / "include"
        ext.include_dirs += [str(include)]
        ext.library_dirs += [str(torch / "lib")]
        optimisation = [] if "-O" in os.environ.get("CXXFLAGS", "") else ["-O3"]
        ext.extra_compile_args = ["-std=c++17", *optimisation, "-g0", "-fvisibility=hidden", "-Wall"]
        if ext.name.endswith("_cuda"):
            self.prepare_cuda(ext, include)
        else:
            ext.libraries += ["c10", "torch_cpu"]
            compiler = [*self.compiler.compiler_so_cxx, *ext.extra_compile_args]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [
                    (source, [*compiler, *flags], suffix)
                    for units, suffix in ((UNITS, ""), (EMULATED, "_emulated"))
                    for source, flags in units.items()
                ]
                ext.extra_objects = [str(path) for path in pool.map(lambda job: self.compile(*job), jobs)]

    def prepare_cuda(self, ext: Extension, include: Path) -> None:
        import torch

        if torch.version.cuda is None:
            raise CannotBuildError(f"torch {torch.__version__} is not a CUDA build")
        home = cuda_home()
        lib = next((path for path in (home / "lib64", home / "lib") if path.exists()), home / "lib64")
        ext.library_dirs += [str(lib)]
        # libtorch.so is in every build of torch and brings libtorch_cuda where there is one; with the static runtime
        # nothing depends on the CUDA version torch was built with.
        ext.libraries += ["c10", "torch_cpu"]
        ext.extra_link_args += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        ext.extra_link_args += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        nvcc = home / "bin" / "nvcc"
        command = [str(nvcc), "-std=c++17", "-O3", "--threads", "0", "-DUSE_CUDA"]
        names = architectures(nvcc)
        ext.define_macros.append(("CONVIT_KERNELS_ARCHITECTURES", f'"{" ".join(names)}"'))
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", *architecture_flags(names), f"-isystem={include}"]
        kernels = [source for source in ext.depends if source.endswith(".cu")]
        ext.extra_objects = [str(self.compile(source, command)) for source in kernels]
        ext.depends += ext.extra_objects  # for other architectures than before, all else being as it was

    def compile(self, source: str, command: list[str], suffix: str = "") -> Path:
        """Compiles a source that takes a command of its own; returns the object, named after it and the suffix."""
        command = [*command, "-c", source, *(f"-D{name}={value}" for name, value in macros())]
        target = Path(self.build_temp) / f"{source.removesuffix('.cpp').removesuffix('.cu')}{suffix}.o"
        # An object is as good as new while its command and all that it was compiled from are the same.
        parts = [" ".join(command).encode(), Path(source).read_bytes()]
        parts += [path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*.h"))]
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
        stamp = target.with_suffix(".sha256")
        if not (target.exists() and stamp.exists() and stamp.read_text() == digest):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.announce(" ".join(command), level=2)
            try:
                subprocess.run([*command, "-o", str(target)], check=True)
            except subprocess.CalledProcessError as error:
                raise CannotBuildError(f"{command[0]} cannot compile {source}; its output says why") from error
            stamp.write_text(digest)
        return target

    def remove_stale(self, ext: Extension) -> None:
        """An older library would otherwise survive in the source tree and be loaded."""
        stale = ROOT / PACKAGE / f"{ext.name.rpartition('.')[2]}.abi3.so"
        stale.unlink(missing_ok=True)


setup(
    ext_modules=[
        extension(
            "_C",
            [
                "csrc/module_cpu.cpp",
                "csrc/tables/cpu.cpp",
                "csrc/attention/op.cpp",
                "csrc/attention/units.cpp",
            ],
            depends=list(UNITS),
        ),
        extension("_C_cuda", ["csrc/module_cuda.cpp"], depends=["csrc/tables/cuda.cu"]),
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
