"""The site builds in strict mode, in which a dead link is an error, and shows every public name and every option."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import scoresde as ss

ROOT = Path(__file__).parent.parent
MKDOCS = """
from material.plugins.search.plugin import SearchIndex
from mkdocs.__main__ import cli
from mkdocstrings_handlers.python._internal import rendering

SearchIndex.add_entry_from_context = lambda index, page: None  # a fifth of the time
rendering._get_formatter = lambda: lambda text, length: text  # Ruff, in a process for each signature
cli()
"""
EXTERNAL = re.compile(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?(?:https?:)?//", re.IGNORECASE)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages by their path in the site, and what the build printed."""
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", MKDOCS, "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


@pytest.mark.slow
def test_every_public_name_has_an_entry(site):
    identifiers = set(re.findall(r'id="?(scoresde\.[\w.]+)', "".join(site.values())))
    modules = {name for name in ss.__all__ if f"api/{name}.html" in site}
    assert {name for name in ss.__all__ if name not in modules} <= {x.removeprefix("scoresde.") for x in identifiers}
    public = {f"scoresde.{name}.{x}" for name in modules for x in getattr(getattr(ss, name), "__all__", ())}
    assert len(modules) >= 15
    assert public <= identifiers, sorted(public - identifiers)


@pytest.mark.slow
def test_every_option_has_a_section(site):
    for path in (ROOT / "conf").glob("*/*.yaml"):
        assert f'id="{path.stem}"' in site[f"configuration/{path.parent.name}.html"], path
    for path in (ROOT / "conf").glob("*.yaml"):
        assert path.stem == "base" or f'id="{path.stem}"' in site["configuration/verbs.html"], path


@pytest.mark.slow
def test_nothing_is_loaded_from_other_servers(site):
    for name, page in site.items():
        assert not EXTERNAL.search(page), (name, EXTERNAL.search(page)[0])


@pytest.mark.slow
def test_formulas_are_markup(site):
    assert site["mathematics.html"].count("<math") > 60
    assert "$" not in re.sub(
        r"<(script|style).*?</\1>|<annotation.*?</annotation>", "", site["mathematics.html"], flags=re.DOTALL
    )
