"""The picture of the package's layers: `docs/architecture.svg`, from what the linter enforces and the modules say.

    python docs/architecture.py           # writes the picture anew
    python docs/architecture.py --check   # exit code 1 if the picture is not that of the code

Layers are those of the import-linter contract in `pyproject.toml`; what each module is for is the first line of its
docstring; the small print is the modules inside of a package. So the picture changes when the code does, and a test
compares them.
"""

import argparse
import ast
import html
import re
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"

WIDTH, MARGIN, GAP = 1000, 24, 10  # of the picture, around it, between boxes
PADDING, LINE, RAIL = 11, 16, 62  # inside a box, from line to line, left of the boxes for the arrow
NAME, TEXT, SMALL = 14, 12, 10.5  # sizes of the type
PER_CHARACTER = {TEXT: 6.75, SMALL: 6.45}  # width of a character, on the wide side of the usual fonts
STYLE = """
.paper { fill: #ffffff; stroke: #d5dae0; }
.box { fill: #f3f6fa; stroke: #b4c0ce; }
.name { fill: #0b4f79; font-weight: 600; }
.text { fill: #1f2933; }
.small { fill: #52606d; font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.rail { stroke: #7b8794; fill: none; stroke-width: 1.5; }
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  .paper { fill: #10161d; stroke: #2c3947; }
  .box { fill: #1a232d; stroke: #3d4f61; }
  .name { fill: #7cc4f0; }
  .text { fill: #e4e9ee; }
  .small { fill: #a3b1bf; }
  .rail { stroke: #8593a1; }
}
"""


@dataclass
class Module:
    """A module or package of a layer: its name, what it is for, and the modules inside of it."""

    name: str
    purpose: str
    inside: list[str]


def layers() -> list[list[Module]]:
    """The layers, the highest first, each the modules that do not import one another."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layered,) = [contract for contract in contracts if contract["type"] == "layers"]
    return [[module(name.strip()) for name in re.split(r"[|:]", layer)] for layer in layered["layers"]]


def module(dotted: str) -> Module:
    """Return the module called `dotted`, read from its source."""
    path = ROOT / Path(*dotted.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    first = (ast.get_docstring(ast.parse(source.read_text())) or "").partition("\n")[0]
    inside = sorted(file.stem for file in path.glob("*.py") if not file.stem.startswith("_")) if path.is_dir() else []
    inside += sorted(f"{folder.parent.name}/" for folder in path.glob("*/__init__.py"))
    return Module(dotted.removeprefix("scoresde."), re.sub(r"[`*]", "", first), inside)


def wrap(text: str, width: float, size: float) -> list[str]:
    """A text in lines of that width."""
    return textwrap.wrap(text, int(width / PER_CHARACTER[size]))


def box(part: Module, x: float, y: float, width: float) -> tuple[list[str], float]:
    """A module's elements with its box at (x, y), less the box itself, and the height it needs."""
    inner, baseline = width - 2 * PADDING, y + PADDING + NAME - 2
    elements = [text("name", x + PADDING, baseline, NAME, part.name)]
    for lines, kind, size in (
        (wrap(part.purpose, inner, TEXT), "text", TEXT),
        (wrap(" ".join(part.inside), inner, SMALL), "small", SMALL),
    ):
        for line in lines:
            baseline += LINE
            elements.append(text(kind, x + PADDING, baseline, size, line))
    return elements, baseline + PADDING - y


def text(kind: str, x: float, y: float, size: float, content: str) -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size:g}">{html.escape(content, quote=False)}</text>'


def draw() -> str:
    """The picture, as SVG."""
    elements, y, right = [], MARGIN, WIDTH - 2 * MARGIN - RAIL
    for layer in layers():
        width = (right - GAP * (len(layer) - 1)) / len(layer)
        places = [MARGIN + RAIL + i * (width + GAP) for i in range(len(layer))]
        drawn = [box(part, x, y, width) for part, x in zip(layer, places, strict=True)]
        height = max(needed for _, needed in drawn)
        for (parts, _), x in zip(drawn, places, strict=True):
            shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
            elements += [f'<rect class="box" {shape}/>', *parts]
        y += height + GAP
    return "\n".join([*head(y - GAP + MARGIN), *rail(y - GAP), *elements, "</svg>", ""])


def head(height: float) -> list[str]:
    """The beginning, and the paper: the picture has its own, and is read on any page."""
    title = "The layers of scoresde: each imports only what lies under it"
    size = f'width="{WIDTH}" height="{height:g}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" {size} role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="10"/>',
    ]


def rail(bottom: float) -> list[str]:
    """The arrow beside the layers, from those above to those they import."""
    x, middle = MARGIN + 36, (MARGIN + bottom) / 2
    label = f'transform="rotate(-90 {x - 12} {middle:g})" text-anchor="middle"'
    return [
        f'<path class="rail" d="M{x} {MARGIN} V{bottom:g} m-5 -8 l5 8 l5 -8"/>',
        f'<text class="text" x="{x - 12}" y="{middle:g}" font-size="{TEXT}" {label}>'
        "each layer imports only what lies under it</text>",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    if parser.parse_args().check:
        raise SystemExit(int(not PICTURE.is_file() or PICTURE.read_text() != draw()))
    PICTURE.write_text(draw())
