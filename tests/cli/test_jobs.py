"""Jobs: sweeps in this process and in others, and commands that several processes share."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from scoresde.cli import main
from scoresde.cli.jobs import Finished
from scoresde.training import distributed
from scoresde.training.checkpoint import load
from tests.cli.conftest import TOY, contents, rows
from tests.processes import start_two

SWEEP = ["train", *TOY, "trainer.evaluate_every=0", "--multirun"]


def test_a_job_of_another_process_is_stored_and_printed_on_arrival(capsys, monkeypatch):
    monkeypatch.setattr("scoresde.cli.jobs.FINISHED", received := [])
    sent = [pickle.dumps(Finished(number, '{"a": 1}', is_shown)) for number, is_shown in ((1, True), (0, False))]
    assert not received
    assert not capsys.readouterr().out
    for text in sent:
        pickle.loads(text)
    assert capsys.readouterr().out == '{"a": 1}\n'
    assert [(job.number, job.record) for job in received] == [(1, {"a": 1}), (0, {"a": 1})]


def jobs(run):
    """(directory, seed, steps) of each job that trained."""
    found = []
    for path in Path(run).glob("*/checkpoint.safetensors"):
        config = yaml.safe_load(path.with_name("config.yaml").read_text())
        found.append((str(path.parent), config["seed"], config["trainer"]["steps"]))
    return sorted(found)


def test_a_sweep_has_a_directory_and_a_record_for_each_job_and_the_code_of_the_worst(tmp_path, capsys):
    run = Path("a" * 100, "b" * 100, "c" * 100)  # a long way down, as temporary directories are
    assert main([*SWEEP, "trainer.steps=2,0,1", f"run={run}", "--json"]) == 2
    output = capsys.readouterr()
    (error,) = output.err.splitlines()
    assert error == "scoresde train: trainer.steps must be an integer >= 1; got 0"
    records = [json.loads(line) for line in output.out.splitlines()]
    assert [record["steps"] for record in records] == [2, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["a" * 100]
    assert jobs(run) == sorted((record["run"], 0, record["steps"]) for record in records)
    assert [Path(record["run"]).name for record in records] == ["trainer.steps=2", "trainer.steps=1"]
    assert Path(run, "sweep_train.csv").read_text().startswith("trainer.steps,jobs,loss,")  # beside the records


def test_the_same_sweep_finds_its_directories_and_a_longer_one_adds_to_them(capsys):
    for seeds, steps in (("0,1", 1), ("1,0,2", 2)):
        assert main([*SWEEP, f"trainer.steps={steps}", f"seed={seeds}", "run=sweep"]) == 0
        expected = [(f"sweep/seed={seed}", int(seed), steps) for seed in sorted(seeds.split(","))]
        assert jobs("sweep") == expected
    assert main([*SWEEP, "trainer.steps=1", "seed=7", "run=alone"]) == 0  # no setting is swept: all are in the name
    (directory, *_) = jobs("alone")[0]
    assert Path(directory).name.startswith("data.test.n=20,data.train.n=200,")


def test_a_sweep_ends_with_a_table_over_seeds(capsys):
    assert main([*SWEEP, "trainer.steps=1", "optimizer.lr=0.1,0.2", "seed=0,1", "run=sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["optimizer.lr", "jobs", "loss"])
    assert [line.split()[:2] for line in lines[start + 1 : start + 3]] == [["0.1", "2"], ["0.2", "2"]]
    losses = [rows(path, file="log.jsonl")[-1]["loss"] for path in sorted(Path("sweep").glob("*lr=0.1*"))]
    header, first, _ = Path("sweep/sweep_train.csv").read_text().splitlines()
    assert header == "optimizer.lr,jobs,loss,loss error"
    assert float(first.split(",")[2]) == pytest.approx(np.mean(losses))
    assert float(first.split(",")[3]) == pytest.approx(abs(losses[0] - losses[1]) / 2)
    assert Path("sweep/sweep_train.png").is_file()


@pytest.mark.slow
def test_jobs_of_joblib_leave_and_print_what_jobs_of_one_process_do(capfd):
    """Two processes start once, for a sweep with records and a job that fails, and for a sweep with tables."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    from joblib.externals.loky import get_reusable_executor

    joblib, sweep = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], [*SWEEP, "trainer.steps=2,0,1"]
    try:
        assert main([*sweep, "run=spread", "--json", *joblib]) == 2
        output = capfd.readouterr()
        assert main([*SWEEP, "trainer.steps=1", "seed=0,1", "run=tables", *joblib]) == 0
        tables = capfd.readouterr()
    finally:
        get_reusable_executor().shutdown()
    records = [json.loads(line) for line in output.out.splitlines()]
    assert jobs("spread") == sorted((record["run"], 0, record["steps"]) for record in records)
    assert all(f"trainer.steps={record['steps']}" in record["overrides"] for record in records)
    assert main([*sweep, "run=here"]) == 2
    assert len(jobs("here")) == len(records) == 2
    for directory, _, _ in jobs("here"):
        name = Path(directory).name
        assert contents(Path("spread", name))["checkpoint.safetensors"] == contents(directory)["checkpoint.safetensors"]
    there, overrides, reported = output.err.splitlines()
    assert there == "scoresde train: trainer.steps must be an integer >= 1; got 0"
    assert "'trainer.steps=0'" in overrides
    assert reported == there.replace("scoresde train: ", "scoresde train: a job failed: ")
    assert tables.out.count("\ncheckpoint ") == 2
    assert jobs("tables") == [("tables/seed=0", 0, 1), ("tables/seed=1", 1, 1)]
    assert ["2"] in [line.split()[:1] for line in tables.out.splitlines()]  # the table: both jobs in one line
    assert Path("tables", "sweep_train.png").is_file()
    assert len(Path("spread", "sweep_train.csv").read_text().splitlines()) == 3  # of the jobs that did not fail


@pytest.mark.slow
def test_tasks_of_a_submitted_job_share_it(capfd):
    """Two tasks, as two processes of torchrun: one log, one record, and one process's weights up to rounding."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    local = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hydra.launcher.tasks_per_node=2"]
    assert main([*SWEEP, "trainer.steps=3", "seed=0", "run=tasks", "--json", *local]) == 0
    output = capfd.readouterr()
    assert main([*SWEEP, "trainer.steps=3", "run=one"]) == 0
    (shared,), (alone,) = (list(Path(run).glob("*/checkpoint.safetensors")) for run in ("tasks", "one"))
    record = json.loads(output.out)
    assert "seed=0" in record["overrides"]
    assert record["paths"]["checkpoint"] == str(shared)
    assert shared.with_name("log.jsonl").read_text().count('"loss"') == 3
    (tensors, info), (expected, expected_info) = load(shared), load(alone)
    assert info["step"] == expected_info["step"] == 3
    torch.testing.assert_close(tensors, expected, rtol=1e-4, atol=1e-6)


def test_a_submission_to_slurm_composes(capsys):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    resources = ["hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=8", "hydra.launcher.tasks_per_node=8"]
    assert main(["train", *TOY, "--cfg", "hydra", "hydra/launcher=submitit_slurm", *resources]) == 0
    config = yaml.safe_load(capsys.readouterr().out)["hydra"]
    launcher = config["launcher"]
    assert launcher["_target_"] == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    assert (launcher["partition"], launcher["gpus_per_node"], launcher["tasks_per_node"]) == ("gpu", 8, 8)
    assert config["sweep"]["dir"] == "${run}"  # its .submitit has the output of the jobs
    assert launcher["submitit_folder"] == "${hydra.sweep.dir}/.submitit/%j"
    assert config["job"]["name"] == "scoresde"


@pytest.mark.parametrize("command", [["dequantize"], ["distill"], ["compare"], ["convert", "source=edm", "path=x.pt"]])
def test_verbs_that_processes_cannot_share_refuse_several(command, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    verbs = "train, sample, bpd, evaluate, score, classify"
    message = f"must run in one process; got 2 processes of torchrun, which can share only {verbs}"
    assert f"{command[0]} {message}" in refused(*command)


def run_commands(commands):
    """Run the commands in this process, one of two that share them; a wrong one ends it."""
    with distributed.processes():
        sys.exit(max([main(command) for command in commands]))


@pytest.mark.slow
def test_two_processes_agree_with_one(grey):
    """Uneven shares: three batches of samples and of test data; a classifier to train, statistics to share."""
    drawing = ["n=40", "sampler.steps=1", "batch_size=16"]
    likelihood = ["likelihood.solver.steps=8", "budget.samples=16", "budget.bound_draws=2"]
    quality = [*drawing, "features=digits", "features.epochs=1", "features.width=4", "bpd=false"]
    commands = [
        ["sample", f"run={grey}", *drawing],
        ["bpd", f"run={grey}", *likelihood],
        ["evaluate", f"run={grey}", *quality],
    ]
    processes = start_two(Path("output").absolute(), run_commands, commands)
    for process in processes:
        process.join(200)
    first, second, *errors = (Path("output", name).read_text() for name in ("0.out", "1.out", "0.err", "1.err"))
    assert [process.exitcode for process in processes] == [0, 0], errors
    assert [first.count(text) for text in ("sampler ", "test bits/dim", "compared with")] == [1, 1, 1]
    assert not second
    shared = rows(grey)
    file = grey / "samples" / shared[0]["file"]
    samples = np.load(file)
    assert {row["provenance"]["processes"] for row in shared} == {2}
    assert [main(command) for command in (*commands[:2], [*commands[2], "statistics=anew"])] == [0, 0, 0]
    alone = rows(grey)[len(shared) :]
    assert np.array_equal(np.load(file), samples)
    assert len(alone) == len(shared) > 3
    for together, row in zip(shared, alone, strict=True):
        for name in {"value", "error", "mean", "stderr", "population", "monte_carlo", "discretisation", "bound"} & {
            *row
        }:
            assert together[name] == pytest.approx(row[name], rel=1e-9), name
