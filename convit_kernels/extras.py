"""What an extra of pyproject.toml needs, and the command that installs what is missing of it.

This package stands on no index, where `pip install 'convit_kernels[demo]'` could find it, so the command names the
packages that the extra stands for.
"""

import re
import shlex
from importlib import metadata
from importlib.util import find_spec

# One in the package's metadata: timm>=1.0.16; extra == "models"
_REQUIREMENT = re.compile(
    r"""(?P<name>[\w.-]+)(\[(?P<extras>[^]]+)])?(?P<versions>[^;]*);\s*extra == ["'](?P<extra>[\w-]+)["']"""
)
_IMPORTED_AS = {"scikit-learn": "sklearn"}  # the others by their own name


def requirements(extra: str) -> dict[str, str]:
    """What an extra needs, by the name that is imported, with its versions: {"timm": "timm>=1.0.16"}.

    Empty where this package has not been installed, so that nothing says what it needs.
    """
    try:
        lines = metadata.requires(str(__package__)) or []
    except metadata.PackageNotFoundError:
        return {}
    needed: dict[str, str] = {}
    for requirement in filter(None, map(_REQUIREMENT.match, lines)):
        if requirement["extra"] != extra:
            continue
        name = requirement["name"]
        if name.replace("-", "_") == __package__:  # its other extras
            for other in requirement["extras"].split(","):
                needed |= requirements(other)
        else:
            imported = _IMPORTED_AS.get(name, name.replace("-", "_"))
            needed[imported] = name + requirement["versions"].strip()
    return needed


def needs(what: str, extra: str, error: ImportError) -> str:
    """Says, for an import of `what` that failed, which packages of the extra are missing and what installs them."""
    imported = (error.name or "").partition(".")[0]
    if not imported:
        return f"{what} cannot be imported: {error}"
    needed = {imported: imported} | requirements(extra)
    missing = {name: package for name, package in needed.items() if name == imported or find_spec(name) is None}
    return f"{what} needs {', '.join(missing)}: {shlex.join(['pip', 'install', *missing.values()])}"
