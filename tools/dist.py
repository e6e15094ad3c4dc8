"""Builds the sdist and the wheel into dist/, and checks them: `make dist`.

One wheel serves all: LibTorch's stable ABI, Python's limited API, every CPU unit, the CUDA kernels. Its tag names the
oldest manylinux that has all the system's libraries it needs; torch's own libraries stay outside.

    python tools/dist.py            builds and checks
    python tools/dist.py --write    writes size and cost of the import into docs/install.md, too
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from convit_kernels.bench.machine import describe, machine

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
INSTALL = ROOT / "docs" / "install.md"
FIGURES = re.compile(r"(<!-- wheel: begin, written by make dist ARGS=--write -->\n).*(<!-- wheel: end -->)", re.DOTALL)
LIBRARIES = ("_C.abi3.so", "_C_cuda.abi3.so")
LEFT_OUT = (".ci/", ".github/", ".gitignore")  # of the repository alone
# Modules and milliseconds of processor time of the import, beside those of torch, which every user pays anyway.
IMPORT = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import convit_kernels
print(len(set(sys.modules) - before), 1000 * (time.process_time() - start))
"""


def run(*command: str | Path) -> str:
    """A tool of this environment; its output, once it has succeeded."""
    environment = {
        "CONVIT_KERNELS_CPU": "1",
        "CONVIT_KERNELS_CUDA": "1",
        **os.environ,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    }
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build() -> tuple[Path, Path]:
    """Sdist and wheel, from the objects that are built already; nothing of an older build gets into the wheel."""
    for folder in (made := ROOT / "build" / "wheel", *ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")):
        shutil.rmtree(folder, ignore_errors=True)
    run("build", "--no-isolation", "--sdist", "--wheel", "--outdir", made, ".")
    (sdist,), (wheel,) = made.glob("*.tar.gz"), made.glob("*.whl")
    shutil.rmtree(DIST, ignore_errors=True)
    excluded = [argument for name in ("libtorch*", "libc10*") for argument in ("--exclude", name)]
    run("auditwheel", "repair", *excluded, "--strip", "--wheel-dir", DIST, wheel)
    shutil.copy(sdist, DIST)
    (repaired,) = DIST.glob("*.whl")
    return DIST / sdist.name, repaired


def check(sdist: Path, wheel: Path) -> None:
    """Ends the program where something is missing or does not belong there."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    strangers = [name for name in names if not re.match(r"convit_kernels(-[\d.]+\.dist-info)?/", name)]
    libraries = LIBRARIES[: 1 if os.environ.get("CONVIT_KERNELS_CUDA") == "0" else 2]
    missing = [name for name in (*libraries, "py.typed", "__init__.py") if f"convit_kernels/{name}" not in names]
    tag = "cp310-abi3-manylinux"
    if strangers or missing or tag not in wheel.name:
        sys.exit(f"{wheel.name}: expected {tag}, no other files than the package's ({strangers}), and {missing}")
    with tarfile.open(sdist) as archive:
        contained = {name.partition("/")[2] for name in archive.getnames()}
    if (ROOT / ".git").exists():
        kept = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
        if lacking := [name for name in kept if name not in contained and not name.startswith(LEFT_OUT)]:
            sys.exit(f"{sdist.name} lacks {', '.join(lacking)}: name them in MANIFEST.in")
    audit = json.loads(run("auditwheel", "show", "--json", wheel))
    outside = [name for name in audit["external_libs"] if not name.startswith(("libtorch", "libc10"))]
    if outside or audit["sym_tag"] not in wheel.name:
        sys.exit(f"{wheel.name} needs libraries of the system: {outside}, symbols of {audit['sym_tag']}")
    run("twine", "check", "--strict", sdist, wheel)


def figures(wheel: Path) -> str:
    """Size of the wheel and cost of the import, as a sentence of docs/install.md."""
    runs = [subprocess.check_output([sys.executable, "-c", IMPORT], cwd=ROOT, text=True).split() for _ in range(7)]
    modules = {int(count) for count, _ in runs}
    milliseconds = statistics.median(float(time) for _, time in runs)
    return (
        f"The wheel has {wheel.stat().st_size / 1e6:.1f} MB. After `import torch`, `import convit_kernels` imports "
        f"{max(modules)} more modules in {milliseconds:.0f} ms of\nprocessor time (median of {len(runs)} on "
        f"{describe(machine())}).\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the figures into docs/install.md")
    write = parser.parse_args().write
    sdist, wheel = build()
    check(sdist, wheel)
    for path in (sdist, wheel):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")
    if write:
        text = INSTALL.read_text()
        if not FIGURES.search(text):
            sys.exit(f"{INSTALL} lacks the section that is written: {FIGURES.pattern}")
        INSTALL.write_text(FIGURES.sub(lambda found: found[1] + figures(wheel) + found[2], text))


if __name__ == "__main__":
    main()
