"""Docstrings for mkdocstrings, an extension of griffe.

Signs of formulas and shapes such as (B, *) are not markup. Where a docstring refers to that of its module, the entry
ends with the text of the module, folded. An object without a docstring, such as a grid of times, shows its value.
"""

import re
import textwrap

import griffe

CODE = re.compile(r"(`[^`]*`)")
REFERENCE = re.compile(r"module(?:'s)?\s+docstring|formulas in")
SIGNS = re.compile(r"([*<]|(?<=\])(?=\())")


class PlainSigns(griffe.Extension):
    """Escapes asterisks, <, and a bracket before a parenthesis, outside of code; adds the module's text."""

    def on_instance(self, *, obj, **kwargs):
        if obj.is_attribute and obj.parent.is_module and obj.docstring is None and obj.value is not None:
            obj.docstring = griffe.Docstring(f"`{obj.value}`", parent=obj)  # such as a grid of times
        if obj.docstring is None:
            return
        text = "\n\n".join(map(escaped, obj.docstring.value.split("\n\n")))
        if REFERENCE.search(text) and not obj.is_module and obj.module.docstring is not None:
            text += f'\n\n??? info "Module {obj.module.path}"\n{textwrap.indent(obj.module.docstring.value, "    ")}'
        obj.docstring.value = text


def escaped(paragraph: str) -> str:
    """Return a paragraph without markup other than code in backticks; unchanged if it is a block of code."""
    if paragraph.startswith("    "):
        return paragraph
    parts = CODE.split(paragraph)
    return "".join(part if part.startswith("`") else SIGNS.sub(r"\\\1", part) for part in parts)
