"""Programs in processes of their own, forked from one that has imported torch: that takes seconds each time."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = """
import gc, json, os, sys
import torch
gc.freeze()
for line in sys.stdin:
    program, folder, path, environment, out, err = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = path
    os.chdir(folder)
    exec(program, {"__name__": "__main__"})
    sys.stdout.flush()
    os._exit(0)  # to end in order would copy all memory that is shared with this process
"""


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """It ends with its input, that is with this process."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def run_program(
    program: str, *path: Path, environment: Mapping[str, str] | None = None, check: bool = True
) -> "subprocess.CompletedProcess[str]":
    """What `python -c program` does in the first of these folders, with all of them on sys.path; else in the current.

    Args:
        environment: variables that it has besides this process's.
        check: raise subprocess.CalledProcessError where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        variables = {**os.environ, **(environment or {})}
        request = (program, str(path[0] if path else Path.cwd()), [*map(str, path)], variables, str(out), str(err))
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        code = int(server.stdout.readline())
        done = subprocess.CompletedProcess(program, code, out.read_text(), err.read_text())
    if check and code:
        print(done.stderr)
        done.check_returncode()
    return done
