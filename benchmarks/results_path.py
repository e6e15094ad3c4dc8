"""Prints where the results of this machine and commit belong: benchmarks/results/MACHINE-COMMIT.json."""

import re
from pathlib import Path

from convit_kernels.bench.machine import machine

found = machine()
name = f"{found['gpu'] or found['cpu']} {found['cpu_capability']} {found['threads']} threads"
slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
print(Path("benchmarks/results") / f"{slug}-{found['commit'] or 'no-commit'}.json")
