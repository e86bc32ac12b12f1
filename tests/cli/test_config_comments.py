"""Comments of configuration files: which key they describe, and where help shows them."""

import yaml

from scoresde.cli.common import config_directory
from scoresde.cli.config_comments import annotated, comments, key_lines, settings_comments

TEXT = """\
# @package _global_
# The file,
# in two lines.
_target_: a.B
steps: 3                       # number of steps
                               # of the loop
name: "x # y"                  # a text with '#'
url: a#b
# Of the inner mapping.
inner:
  deep: {a: 1}   # a mapping
  values:
  - 1  # no key
plain: 1

# far above
last: 2
"""


def test_comments_belong_to_keys():
    assert comments(TEXT) == {
        "": "The file, in two lines.",
        "steps": "number of steps of the loop",
        "name": "a text with '#'",
        "inner": "Of the inner mapping.",
        "inner.deep": "a mapping",
        "last": "far above",
    }


def test_keys_are_those_that_yaml_reads():
    """Of every configuration of a group: mappings in block style, by their dotted paths."""

    def paths(node, prefix=""):
        for key, value in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{key}"
            yield from paths(value, f"{prefix}{key}.")

    for path in sorted(config_directory().glob("*/*.yaml")):
        text = path.read_text()
        assert {key for _, key in key_lines(text) if key} <= {*paths(yaml.safe_load(text))} | {"train.<<"}, path


def test_long_comments_stand_above_their_line():
    described = {"a": "short", "a.b": "long " * 30, "c": "beside"}
    text = annotated("a:\n  b: 1\nc: 2\n", described, width=60)
    lines = text.splitlines()
    assert lines[0] == "a:".ljust(30) + "  # short"
    assert all(line.startswith("  # long long") and len(line) <= 60 for line in lines[1:-2])
    assert lines[-2:] == ["  b: 1", "c: 2".ljust(30) + "  # beside"]
    assert yaml.safe_load(text) == {"a": {"b": 1}, "c": 2}


def test_the_chosen_options_and_the_experiment_describe_the_settings(tmp_path):
    for name, text in {
        "go.yaml": "steps: 1  # of the verb\n",
        "part/one.yaml": "# The first part.\nsize: 1  # of one\n",
        "part/two.yaml": "size: 2  # of two\n",
        "experiment/e.yaml": "# An experiment.\nsteps: 5  # of the experiment\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = {"steps": "of the verb", "part": "The first part.", "part.size": "of one"}
    assert settings_comments([tmp_path], "go", {"part": "one", "other": None}) == expected
    chosen = settings_comments([tmp_path], "go", {"experiment": "e", "part": "two"})
    assert chosen == {"steps": "of the experiment", "part.size": "of two"}


def test_every_option_is_described():
    options = [path for path in config_directory().rglob("*.yaml") if path.parent != config_directory()]
    assert [str(path) for path in options if not comments(path.read_text()).get("")] == []
