"""`scoresde score`: the same numbers as `ss.log_prob` of standardised rows, for new files and for splits."""

import csv
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

import scoresde as ss
from scoresde.cli import main
from tests.cli.conftest import rows

QUICK = ["likelihood=exact", "likelihood.solver.steps=6"]
NEW = "name,kind,b,a\nfirst,x,13.0,250\nsecond,z,9.5,180\nthird,x,11,231\n"


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_new_table_is_read_by_the_columns_and_classes_of_the_run(run, capsys):
    """Other order of the columns, fewer classes, names of the rows, and no training table."""
    Path("train.csv").unlink()
    Path("new.csv").write_text(NEW)
    assert main(["score", run, "data.path=new.csv", "id=name", *QUICK]) == 0
    loaded = ss.load("run")
    mean, std = (torch.tensor(list(loaded.config.data.transform[key])) for key in ("mean", "std"))
    x = (torch.tensor([[250, 13.0], [180, 9.5], [231, 11]]).double() - mean) / std
    solver = ss.solvers.Adams(steps=6)
    nats = (
        ss.log_prob(loaded.model, x.float(), torch.tensor([0, 2, 0]), ss.ExactTrace(), solver).value - std.log().sum()
    )
    table = read(Path("run", "scores").glob("*.csv").__next__())
    assert [row["id"] for row in table] == ["first", "second", "third"]
    np.testing.assert_allclose([float(row["log_likelihood_nats"]) for row in table], nats, rtol=1e-5)
    assert {row["standard_error_nats"] for row in table} == {"0.0"}
    assert {row["status"] for row in table} == {"OK"}
    (row,) = rows("run")
    assert (row["kind"], row["split"], row["n"], row["failed"]) == ("scores", "new", 3, 0)
    assert "3 OK" in capsys.readouterr().out


def test_all_splits_as_parquet_agree_with_the_likelihood_of_a_split(run):
    assert main(["score", run, "split=all", "out=all.parquet", "likelihood.solver.steps=6"]) == 0
    assert main(["bpd", run, "likelihood.solver.steps=6", "budget.samples=0"]) == 0
    table = pyarrow.parquet.read_table("all.parquet").to_pydict()
    assert sorted(table["id"]) == list(range(50))
    assert [table["split"].count(name) for name in ("train", "validation", "test")] == [30, 10, 10]
    assert table["id"][40:] == ss.data.Table("train.csv", "test", ["a", "b"], "kind", test=0.2, validation=0.2).ids
    likelihood = rows("run", "likelihood")[0]
    assert -np.mean(table["log_likelihood_nats"][40:]) / 2 == pytest.approx(likelihood["mean"])
    assert min(table["standard_error_nats"]) > 0


def test_failed_samples_have_empty_cells_and_a_status(run, capsys, monkeypatch):
    evaluate = ss.evaluation.batch_likelihood.log_prob

    def fails(*arguments):
        result = evaluate(*arguments)
        result.value[3], result.status[3] = math.nan, ss.solvers.Status.BUDGET
        return result

    monkeypatch.setattr(ss.evaluation.batch_likelihood, "log_prob", fails)
    assert main(["score", run, "likelihood.solver.steps=6", "out=scores.csv"]) == 0
    output = capsys.readouterr()
    assert "9 OK, 1 BUDGET" in output.out
    assert "failed for 1 of 10 samples, at [3] (BUDGET)" in output.err
    table = read("scores.csv")
    assert [i for i, row in enumerate(table) if not row["log_likelihood_nats"]] == [3]
    assert table[3]["status"] == "BUDGET"


def test_grey_levels_have_bits_per_dimension(grey):
    assert main(["score", f"run={grey}", "likelihood.solver.steps=4", "out=bits.csv"]) == 0
    table = read("bits.csv")
    assert [row["id"] for row in table] == [str(i) for i in range(297)]
    assert 2.5 < np.mean([float(row["bits_per_dim"]) for row in table]) < 6


def test_wrong_tables_and_settings_are_answered_in_one_line(run, toy, refused):
    def answer(text, *arguments):
        Path("new.csv").write_text(text)
        return refused("score", run, "data.path=new.csv", *arguments)

    assert "'b' does not name one column of new.csv: the columns are name, kind, c, a" in answer(
        NEW.replace(",b,", ",c,"), "id=name"
    )
    assert "columns of the training table, a, b; got 'name' as well: remove this column, or" in answer(NEW)
    assert "label of new.csv must be one of the run's classes x, y, z; got 'w'" in answer(
        NEW.replace("third,x", "third,w"), "id=name"
    )
    assert "split must be null with data.path" in answer(NEW, "split=test")
    assert "id must be null without data.path; got 'name'" in refused("score", run, "id=name")
    assert "ends in .csv or .parquet; got x.txt" in refused("score", run, "out=x.txt")
    assert "tolerance must be null for a table of likelihoods" in refused("score", run, "likelihood=multilevel")
    assert "data.path needs a run whose data come from a file" in refused("score", f"run={toy}", "data.path=new.csv")


def test_results_in_python_write_the_same_table(tmp_path):
    value = torch.tensor([-1.25, math.nan])
    status = torch.tensor([0, ss.solvers.Status.NONFINITE])
    result = ss.LogProb(value, value.abs(), value, status, status, status, value, value[:, None])
    table = read(result.to_csv(tmp_path / "nats.csv", ids=["p", "q"]))
    assert table[0] == {
        "id": "p",
        "log_likelihood_nats": "-1.25",
        "standard_error_nats": "1.25",
        "status": "OK",
    }
    assert list(table[1].values()) == ["q", "", "", "NONFINITE"]
    with pytest.raises(ValueError, match=r"one length; id has 3, log_likelihood_nats has 2"):
        result.to_csv(tmp_path / "nats.csv", ids=range(3))
    with pytest.raises(ValueError, match="RoundTrip has no values of single samples"):
        ss.likelihood.RoundTrip(value, value, value).to_csv(tmp_path / "x.csv")
