"""Tables of the page."""

from dataclasses import dataclass


@dataclass
class Table:
    """Cells under titles: the first of each line is its title. The name tells it from other tables of its kind."""

    caption: str
    titles: list[str]
    lines: list[list[str]]
    name: str = ""
