"""The command line: one file a command."""

import functools
from collections.abc import Callable
from typing import Any

import typer

from ..extras import needs
from . import demo, info, locality, profile, report, selfcheck, tune
from .output import stop

app = typer.Typer(help="Fast, exact gated positional self-attention (GPSA) of ConViT.", no_args_is_help=True)


def _fails_in_one_line(command: Callable[..., None], name: str, extra: str) -> Callable[..., None]:
    """The command, whose errors that a user can mend become one line on stderr and an exit code.

    2: something that was given does not fit, or a file cannot be read or written. 1: a package of `extra` is missing.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ImportError as error:
            raise stop(needs(name, extra, error), 1) from error
        except BrokenPipeError:  # whoever reads has read enough: no failure
            raise
        except (ValueError, OSError) as error:
            raise stop(error, 2) from error

    return run


# in the order of --help, with the extra of pyproject.toml that has what the command imports
for _module, _extra in (
    (info, "cli"),
    (selfcheck, "cli"),
    (tune, "cli"),
    (demo, "demo"),
    (profile, "bench"),
    (report, "bench"),
    (locality, "locality"),
):
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name)(_fails_in_one_line(_module.command, _name, _extra))
