"""Tables of the page."""

from dataclasses import dataclass


@dataclass
class Table:
    """Cells under titles: the first of each line is its title."""

    caption: str
    titles: list[str]
    lines: list[list[str]]
