"""Builds the documentation's site in build/site, strictly.

docs/ is Markdown that reads well where it is. For the site its pages are copied to build/docs, those of the root beside
them. A link to a file that the site does not have, a source file say, becomes the file's path there. What is wrong is
printed, and the exit code is 1:

- a link of a page, the README's among them, to a file that does not exist;
- what the site's generator complains of: links to headings that are not there, names without a docstring;
- a page that neither the navigation nor another page leads to, and an entry of the navigation without a page;
- a page that would load anything from another server.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG, DOCS, SITE = ROOT / "mkdocs.yml", ROOT / "build/docs", ROOT / "build/site"
FROM_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
COPIED = {".css", ".csv", ".md", ".png", ".svg"}

# fenced code, code spans, then what is looked for: [text](target), also of images
_MARKDOWN = re.compile(
    r"^```.*?^```$|(?P<ticks>`+).+?(?P=ticks)|(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)
_NAVIGATION = re.compile(r"[\w/.-]+\.md(?=\s*$)", re.MULTILINE)
# what a browser fetches by itself, unlike the target of a link
_FETCHED = re.compile(
    r"""(?:<(?:script|img|iframe|source)\b[^>]*\bsrc=|<link\b[^>]*\bhref=|@import\s+|\burl\()["']?(?:https?:)?//[^"'\s>)]+"""
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def pages() -> dict[Path, Path]:
    """Every file of the documentation, and its place in the site's sources."""
    found = {
        path: DOCS / path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*") if path.suffix in COPIED
    }
    return found | {ROOT / name: DOCS / to for name, to in FROM_ROOT.items() if (ROOT / name).exists()}


def moved(text: str, source: Path, places: dict[Path, Path], problems: list[str], linked: set[Path]) -> str:
    """A page's text with the links that it needs in its new place."""

    def replacement(match: re.Match[str]) -> str:
        to = match["to"]
        if to is None or re.match(r"[a-z]+:|#", to):
            return match[0]
        path, _, heading = to.partition("#")
        target = Path(os.path.normpath(source.parent / path))
        if not target.exists():
            line = text.count("\n", 0, match.start()) + 1
            problems.append(f"{source.relative_to(ROOT)}:{line}: {path} does not exist")
            return match[0]
        if target not in places:
            return f"`{target.relative_to(ROOT)}`"
        linked.add(target)
        if source not in places:
            return match[0]
        relative = os.path.relpath(places[target], places[source].parent)
        return f"{match['image']}[{match['text']}]({relative}{'#' if heading else ''}{heading})"

    return _MARKDOWN.sub(replacement, text)


def copy_pages() -> Iterator[str]:
    """Fills build/docs; what is wrong with the pages."""
    shutil.rmtree(DOCS, ignore_errors=True)
    places = pages()
    problems: list[str] = []
    linked: set[Path] = set()
    for source, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            place.write_text(moved(source.read_text(), source, places, problems, linked))
        else:
            shutil.copy(source, place)
    readme = ROOT / "README.md"
    moved(readme.read_text(), readme, places, problems, linked)
    yield from problems
    navigation = {DOCS / name for name in _NAVIGATION.findall(CONFIG.read_text())}
    for place in sorted(navigation - set(places.values())):
        yield f"mkdocs.yml: {place.relative_to(DOCS)} does not exist"
    for source, place in sorted(places.items()):
        if source.suffix == ".md" and place not in navigation and source not in linked:
            yield f"{source.relative_to(ROOT)}: neither mkdocs.yml nor another page leads to it"


def fetched(text: str) -> list[str]:
    """What a page or a style sheet loads from other servers."""
    return [match[0] for match in _FETCHED.finditer(text)]


def main() -> int:
    problems = list(copy_pages())
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(CONFIG)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        problems.append(_COLOURS.sub("", run.stdout + run.stderr).strip())
    for path in sorted([*SITE.rglob("*.html"), *SITE.rglob("*.css")]):
        problems += [f"{path.relative_to(ROOT)}: loads {what}" for what in fetched(path.read_text())]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"built {SITE.relative_to(ROOT)}/index.html")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
