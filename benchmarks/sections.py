"""A section of the README that is made from a file of results, between markers that name the file."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


class Section:
    """The section of a name: `begin` and `end` are its markers, the first to be formatted with the results' source."""

    def __init__(self, name: str) -> None:
        self.begin = f"<!-- {name}: begin ({{source}}), written by make results -->"
        self.end = f"<!-- {name}: end -->"
        self._pattern = re.compile(rf"<!-- {name}: begin \((?P<source>[^)]*)\).*?{self.end}", re.DOTALL)

    def search(self, text: str) -> re.Match[str] | None:
        """The section in a text; group "source" is the path of its results, from the project's root."""
        return self._pattern.search(text)

    def source(self) -> Path:
        """The results that the README's section names; ends the program where there is no section."""
        found = self.search(README.read_text())
        if found is None:
            sys.exit(f"{README} lacks a section: put '{self.begin}' and '{self.end}' where it belongs")
        return ROOT / found["source"]

    def write(self, section: str) -> None:
        """Replaces the README's section, markers included."""
        README.write_text(self._pattern.sub(lambda _: section, README.read_text(), count=1))
