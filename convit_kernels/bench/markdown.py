"""Tables of documents."""

from collections.abc import Iterable


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], named: int = 1) -> list[str]:
    """The lines of a table in Markdown; the first `named` columns are text, the others numbers."""
    headings = list(headings)
    rule = ["---"] * named + ["---:"] * (len(headings) - named)
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]
