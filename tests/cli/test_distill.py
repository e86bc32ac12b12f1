"""`scoresde distill`: learned solvers in the directory of a run, and the verbs that use them."""

import json
from pathlib import Path

import numpy as np
import pytest

from scoresde.cli import main
from tests.cli.conftest import contents, rows

FEW = ["method.steps=3", "method.pool=16", "method.held_out=8", "method.batch_size=8", "method.target_steps=12"]


def test_solvers_are_stored_shown_kept_and_learned_again(toy, capsys):
    before, command, files = contents(toy), ["distill", f"run={toy}", "nfe=[3,4]", *FEW], {}
    assert main(command) == 0
    assert contents(toy) == before
    table = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    written = rows(toy, "distillation")
    assert [row["nfe"] for row in written] == [3, 4]
    for line, row in zip(table[1:], written, strict=True):
        assert line[:2] == [str(row["nfe"]), f"{row['rms']:.4g}"]
        assert 0 < row["rms"] < 2 * row["formula_rms"] < 2
        files[row["file"]] = (toy / row["file"]).read_bytes()
    assert sorted(files) == ["solvers/nfe3.safetensors", "solvers/nfe4.safetensors"]
    assert main([*command, "seed=1"]) == 0
    assert capsys.readouterr().out.count("kept") == 2
    assert {name: (toy / name).read_bytes() for name in files} == files
    assert main([*command, "seed=1", "again=true", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [(row["nfe"], row["kept"], row["seed"]) for row in record["rows"]] == [(3, False, 1), (4, False, 1)]
    assert (toy / "solvers/nfe4.safetensors").read_bytes() != files["solvers/nfe4.safetensors"]


def test_other_verbs_use_a_learned_solver(toy, refused):
    assert main(["distill", f"run={toy}", "nfe=[3,4]", *FEW]) == 0
    assert main(["sample", f"run={toy}", "n=4", "sampler=learned", "sampler.nfe=3"]) == 0
    (row,) = rows(toy, "samples")
    assert (row["sampler"], row["nfe"]) == ("learned", 3)
    assert np.isfinite(np.load(toy / "samples" / row["file"])).all()
    compared = ["samplers=[learned,ddim]", "nfe=[3,4]", "n=16", "resamples=4"]
    assert main(["compare", f"run={toy}", *compared, "metrics=[mean_error]"]) == 0
    nfe = [(row["sampler"], row["nfe"]) for row in rows(toy, "comparison") if row["budget"]]
    assert nfe == [("learned", 3), ("learned", 4), ("ddim", 3), ("ddim", 4)]
    missing = f"no learned solver at {toy}/solvers/nfe5.safetensors: learn it by `scoresde distill run=... method=sol"
    assert missing in refused("sample", f"run={toy}", "sampler=learned", "sampler.nfe=5")
    Path(toy, "solvers/nfe5.safetensors").write_bytes(b"solver")
    assert "nfe5.safetensors must hold a learned solver" in refused("distill", f"run={toy}", "nfe=[5]", *FEW)


def test_starts_have_the_labels_of_the_data(labelled, capsys):
    assert main(["distill", f"run={labelled}", "nfe=[2]", *FEW, "guidance=cfg", "method.folder=guided"]) == 0
    (row,) = rows(labelled, "distillation")
    assert (row["file"], row["guidance"]["scale"], row["conditional"]) == ("guided/nfe2.safetensors", 1.0, True)
    draw = ["sample", f"run={labelled}", "n=2", "cond.label=3", "guidance=cfg", "sampler=learned", "sampler.nfe=2"]
    assert main([*draw, f"sampler.directory={labelled}/guided"]) == 0
    assert rows(labelled, "samples")[0]["nfe"] == 4  # two networks


QUICK = ["method=likelihood_solver", "method.steps=[6]", "method.samples=12", "method.iterations=1", "method.modes=2"]


def test_a_solver_of_the_likelihood_is_stored_kept_and_used(toy, capsys):
    command = ["distill", f"run={toy}", *QUICK, "method.reference_steps=16"]
    assert main(command) == 0
    title, line = (text.split() for text in capsys.readouterr().out.splitlines()[:2])
    (row,) = rows(toy, "distillation")
    assert (row["file"], row["samples"]) == ("likelihood_solvers/steps6.safetensors", 12)
    assert (title[0], line[:2]) == ("steps", ["6", f"{row['rms']:.2e}"])
    assert main(command) == 0
    assert "kept" in capsys.readouterr().out
    evaluate = ["bpd", f"run={toy}", "budget.samples=0"]
    assert main([*evaluate, "likelihood=learned", "likelihood.solver.steps=6"]) == 0
    (measured,) = rows(toy, "likelihood")
    assert measured["conventions"]["solver"].startswith("StoredAdams(LearnedAdams(steps=6, ")
    assert measured["nfe"] == 2 + 7  # two for a check


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nfe=[0]", "nfe[0] must be an integer >= 1"),
        ("nfe=[2,2]", "nfe must be a list [...]"),
        ("method.rate=nan", "method.rate must be a finite number > 0; got nan"),
        ("method.stepz=3", "no key 'method.stepz'; did you mean method.steps?"),
        ("method=no_such", "no_such"),
    ],
)
def test_wrong_settings_are_answered_in_one_line(override, message, toy, refused):
    assert message in refused("distill", f"run={toy}", override)
    assert not Path(toy, "solvers").exists()
