r"""Formulas $...$ and $$...$$ of Markdown as MathML, which browsers show without JavaScript or downloaded fonts."""

import re
from html import unescape
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

LOG = re.compile(r"\\log(?= ?[a-zA-Z\\])")  # before a name, which needs a space
PRIME = re.compile("<msup>((?:(?!<msup>).)*?)<mi>&#x02032;</mi></msup>")  # the sign is already raised
BEFORE_ESCAPES = 185  # after code, before backslashes, which are part of formulas


class Formula(InlineProcessor):
    """The MathML of the formula between dollars."""

    def __init__(self, pattern: str, md: Markdown, display: str):
        super().__init__(pattern, md)
        self.display = display

    def handleMatch(self, m, data):  # noqa: N802 - name of the base class
        formula = unescape(m.group(1)).replace(r"\mathrm{", r"\text{")  # which keeps a single letter upright
        formula = LOG.sub(r"\\log\\,", formula)
        mathml = PRIME.sub(
            r"<mrow>\1<mo lspace='0' rspace='0'>&#x02032;</mo></mrow>", convert(formula, display=self.display)
        )
        if self.display == "inline":
            return self.md.htmlStash.store(mathml), m.start(0), m.end(0)
        block = Element("div", {"class": "formula"})
        block.text = self.md.htmlStash.store(mathml)
        return block, m.start(0), m.end(0)


class MathML(Extension):
    """The extension of Markdown."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        block = Formula(r"\$\$(.+?)\$\$", md, "block")
        md.inlinePatterns.register(block, "formula-block", BEFORE_ESCAPES + 1)
        inline = Formula(r"(?<![\\$])\$(?![\s$])([^$]+?)(?<!\s)\$(?![\d$])", md, "inline")
        md.inlinePatterns.register(inline, "formula", BEFORE_ESCAPES)
