"""Runs by their name, names of files, settings by their path."""

from pathlib import Path

import pytest

from scoresde.cli.common import MAX_NAME, safe_name


def new_run(path):
    Path(path).mkdir(parents=True)
    Path(path, "config.yaml").write_text("{}")


@pytest.mark.parametrize("verb", ["sample", "bpd", "evaluate", "compare", "restore", "classify", "distill", "report"])
def test_an_unknown_run_is_answered_with_the_nearest(verb, refused):
    for name in ("digits", "spirals"):
        new_run(f"runs/{name}")
    error = refused(verb, "run=runs/digts")
    assert error.startswith(f"scoresde {verb}: no run at runs/digts (no config.yaml in it); did you mean run=runs/dig")
    assert "did you mean run=runs/digits? Available: run=runs/digits, run=runs/spirals; `scoresde train exp" in error


def test_runs_are_suggested_from_the_usual_folder_and_as_they_are_typed(refused):
    assert refused("sample", "run=digits").endswith(
        "no run at digits (no config.yaml in it); `scoresde train experiment=digits` makes one"
    )
    new_run("runs/spirals")
    new_run("runs/experiment=toy2d,seed=1")
    assert "did you mean run=runs/spirals?" in refused("sample", "run=spiral")
    assert "no run at zzzz (no config.yaml in it); available: run=runs/exp" in refused("sample", "run=zzzz")
    assert "did you mean run=runs/spirals?" in refused("sample", "runs/spirals")
    error = refused("sample", "run=runs/experiment=toy2d,sed=1")
    assert "did you mean run=runs/experiment=toy2d,seed=1?" in error


@pytest.mark.parametrize("verb", ["sample", "train", "restore"])
@pytest.mark.parametrize(("value", "shown"), [("", "''"), ("null", "null"), ("[a]", "['a']")])
def test_a_run_is_a_path(verb, value, shown, refused):
    several = " or a list [...] (a directory), not empty, without repetitions" if verb == "sample" else ""  # a cascade
    assert f"run must be a directory{several}; got {shown}" in refused(verb, f"run={value}")


@pytest.mark.parametrize("name", ["7", "true", "a=1,b=2", "[a"])
def test_a_run_may_have_a_name_that_hydra_reads_otherwise(name, refused):
    assert f"no run at {name} (no config.yaml in it)" in refused("sample", f"run={name}")


def test_different_texts_are_different_names_without_special_characters():
    assert safe_name("sde=vp,optimizer.lr=1e-3,+text=bert") == "sde=vp,optimizer.lr=1e-3,+text=bert"
    names = [safe_name(f"network.multipliers={text}") for text in ("[1,2]", "'1,2'", "{1,2}")]
    assert len(set(names)) == 3
    assert all(name.startswith("network.multipliers=-1,2-") and name.isascii() for name in names)


def test_a_long_name_is_cut_and_stays_unique():
    assert safe_name("x" * MAX_NAME) == "x" * MAX_NAME
    first, second = (safe_name("é" * 300 + f",seed={seed}") for seed in (0, 1))
    assert first != second
    assert max(len(safe_name("x" * 300 + text).encode()) for text in ("", "é")) <= 255
