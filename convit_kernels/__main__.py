"""The command line: `python -m convit_kernels`, installed also as `convit-kernels`."""

import sys

from .extras import needs


def main() -> None:
    """Runs the command line, or says how to install what it needs."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        sys.exit(needs("the command line", "cli", error))
    app()


if __name__ == "__main__":
    main()
