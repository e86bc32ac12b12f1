"""Docstrings for mkdocstrings: signs of formulas and shapes such as (B, *) are not markup (an extension of griffe)."""

import re

import griffe

CODE = re.compile(r"(`[^`]*`)")
SIGNS = re.compile(r"([*<]|(?<=\])(?=\())")


class PlainSigns(griffe.Extension):
    """Escapes asterisks, <, and a bracket before a parenthesis, outside of code."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = "\n\n".join(map(escaped, obj.docstring.value.split("\n\n")))


def escaped(paragraph: str) -> str:
    """Return a paragraph without markup other than code in backticks; unchanged if it is a block of code."""
    if paragraph.startswith("    "):
        return paragraph
    parts = CODE.split(paragraph)
    return "".join(part if part.startswith("`") else SIGNS.sub(r"\\\1", part) for part in parts)
