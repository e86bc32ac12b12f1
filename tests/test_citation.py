"""CITATION.cff: valid in version 1.2.0 of its format, and of this version of the project."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
if not (ROOT / "CITATION.cff").is_file():
    pytest.skip("the citation file is not part of this distribution", allow_module_level=True)
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KNOWN = {  # the keys of the format, at the top and of a reference, which we use
    "file": {"cff-version", "message", "title", "type", "authors", "version", "license", "abstract", "keywords"},
    "reference": {"type", "title", "authors", "year", "collection-title", "conference", "identifiers", "url", "notes"},
}


def test_has_what_the_format_asks_for():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert CITATION.keys() - {"references"} == KNOWN["file"]
    assert all(isinstance(CITATION[key], str) for key in ("message", "title", "abstract", "version"))
    assert len(set(CITATION["keywords"])) == len(CITATION["keywords"]) > 0


def test_is_of_this_version_and_its_authors():
    assert CITATION["version"] == PROJECT["version"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == PROJECT["authors"]
    assert PROJECT["name"] in CITATION["title"]


def test_references_are_papers_that_the_code_names():
    sources = "".join(path.read_text() for path in (ROOT / "scoresde").rglob("*.py"))
    references = {}
    for reference in CITATION["references"]:
        assert reference.keys() == KNOWN["reference"]
        assert all(author.keys() == {"family-names", "given-names"} for author in reference["authors"])
        (identifier,) = reference["identifiers"]
        number = re.fullmatch(r"arXiv:(\d{4}\.\d{5})", identifier["value"])[1]
        assert reference["url"] == f"https://arxiv.org/abs/{number}"
        assert number in sources
        references[number] = reference
    assert references["2011.13456"]["authors"][0]["family-names"] == "Song"
