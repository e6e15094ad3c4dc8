"""The table of docs/drop-in.md: what people do with a model, with timm's layer and with ours, from the tests of it.

A test that proves a row carries `@pytest.mark.situation(topic, situation, timm=..., ours=...)`, all literal texts. This
reads the tests' sources without importing them, so that tests of tools which are not installed count too.

python -m tools.situations
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "drop-in.md"
BEGIN, END = "<!-- situations: generated from the tests -->", "<!-- end of situations -->"
TOPICS = ("Exporting", "Derivatives", "Compiling", "Tools", "Distributed", "timm", "Variants")


class Situation(NamedTuple):
    """One row: a topic of TOPICS, what somebody does, and what comes of it with timm's layer and with ours."""

    topic: str
    text: str
    timm: str
    ours: str
    test: str


def _marks(function: ast.AST) -> Iterator[ast.Call]:
    for decorator in getattr(function, "decorator_list", []):
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.situation":
            yield decorator


def situations() -> list[Situation]:
    """All of them, by topic, then by file and line.

    Raises:
        ValueError: a topic that is not of TOPICS, or a text that is no literal.
    """
    rows = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in _marks(node):
                topic, text = (ast.literal_eval(argument) for argument in mark.args)
                outcome = {keyword.arg: ast.literal_eval(keyword.value) for keyword in mark.keywords}
                test = f"{path.relative_to(ROOT)}:{mark.lineno}"
                if topic not in TOPICS:
                    raise ValueError(f"{test}: the topic {topic!r} is not one of {TOPICS}")
                rows.append(Situation(topic, text, outcome["timm"], outcome["ours"], test))
    return sorted(rows, key=lambda row: TOPICS.index(row.topic))


def table() -> str:
    """The rows in Markdown; each links to the file of its test."""
    lines = ["| | situation | timm's layer | ours |", "| --- | --- | --- | --- |"]
    for topic, text, timm, ours, test in situations():
        file = test.rpartition(":")[0]
        lines.append(f"| {topic} | [{text}](../{file}) | {timm} | {ours} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """The page with the table of today between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
