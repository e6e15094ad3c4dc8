"""Writes docs/cli.md from the command line itself.

python -m tools.cli_page
"""

from pathlib import Path
from typing import Any

import typer

from convit_kernels.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def page() -> str:
    """The page as Markdown. Nothing in it depends on the terminal or the machine."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Command line",
        "<!-- written by `python -m tools.cli_page`: change the help texts in convit_kernels/cli instead -->",
        group.help,
        "`convit-kernels COMMAND`, or `python -m convit_kernels COMMAND`. Each command ends with 0 when all is well; "
        "with 1 when what it checks has failed, or when a package is missing; with 2 when something that was given "
        "does not fit. The last two say what is wrong in a line on stderr. A file that could not be written is refused "
        "before the work, and none is ever left half-written.",
        "\n".join(f"- [`{name}`](#{name}): {_summary(command)}" for name, command in group.commands.items()),
    ]
    for name, command in group.commands.items():
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        parts += [f"## {name}", command.help]
        parts.append(f"```\n{' '.join(['convit-kernels', name, *map(_usage, arguments), '[OPTIONS]'])}\n```")
        rows = [f"| `{_usage(argument)}` | | {_cell(argument.help)} |" for argument in arguments]
        rows += [f"| `{_written(option)}` | {_default(option)} | {_cell(option.help)} |" for option in options]
        parts.append("\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _summary(command: Any) -> str:
    return str(command.help).partition("\n")[0]


def _usage(argument: Any) -> str:
    return str(argument.name.upper()) + ("..." if argument.nargs == -1 else "")


def _written(option: Any) -> str:
    """An option as one types it: --grid GRID GRID."""
    flag = option.opts[0]
    return " ".join([flag] + [flag.lstrip("-").upper()] * (0 if option.is_flag else option.nargs))


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    if option.is_flag or option.default is None:
        return ""
    values = option.default if isinstance(option.default, tuple | list) else [option.default]
    return f"`{' '.join(map(str, values))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
