"""Tables as lines of text. No cell is ever cut or wrapped: a terminal wraps a line that is wider than it is, and a pipe
gets every line whole, with the same number of cells in each."""

from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.text import Text

GAP = "  "
NOTHING = "-"  # in a cell that has no value: programs count cells

Cell = str | Text


def table_lines(titles: Sequence[str], rows: Iterable[Sequence[Cell]], *, right: Collection[str] = ()) -> list[Text]:
    """A heading and a line for each row, their columns below each other; those of `right` at the right.

    A title may have several lines. What a terminal would not print is left out of cells.
    """
    heads = [title.split("\n") for title in titles]
    height = max(map(len, heads))
    padded = [[""] * (height - len(head)) + head for head in heads]
    heading = [[Text(line, style="bold") for line in lines] for lines in zip(*padded, strict=True)]
    body = [[_text(cell) for cell in row] for row in rows]
    widths = [max(cell.cell_len for cell in column) for column in zip(*heading, *body, strict=True)]
    return [_line(row, widths, [title in right for title in titles]) for row in (*heading, *body)]


def print_lines(lines: Iterable[Cell], console: Console | None = None) -> None:
    """To stdout, or to `console`."""
    console = console or Console()
    for line in lines:
        console.print(Text(line) if isinstance(line, str) else line, soft_wrap=True, highlight=False)


def _text(cell: Cell) -> Text:
    text = cell if isinstance(cell, Text) else Text(cell)
    if not text.plain.isprintable():
        text = Text("".join(char if char.isprintable() else " " for char in text.plain), style=text.style)
    return text if text.plain.strip() else Text(NOTHING)


def _line(row: Sequence[Text], widths: Sequence[int], at_right: Sequence[bool]) -> Text:
    line = Text()
    for number, (cell, width, right) in enumerate(zip(row, widths, at_right, strict=True)):
        space = " " * (width - cell.cell_len)
        line.append(GAP if number else "")
        line.append_text(Text(space).append_text(cell) if right else cell.copy().append(space))
    line.rstrip()
    return line
