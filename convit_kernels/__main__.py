"""The command line: `python -m convit_kernels`, installed also as `convit-kernels`."""

import importlib.util
import sys


def main() -> None:
    """Runs the command line, or says how to install what it needs."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"the command line needs {' and '.join(missing)}: pip install 'convit_kernels[cli]'")
    from .cli import app

    app()


if __name__ == "__main__":
    main()
