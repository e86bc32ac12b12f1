"""Sweeps by Hydra's launchers: jobs in other processes leave what they would leave in this one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from scoresde.cli import main, options_first
from scoresde.cli.common import LONGEST_NAME, file_name
from scoresde.training.checkpoint import load

pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

TOY = ["experiment=toy2d", "trainer.batch_size=32", "network.width=16", "network.depth=1", "data.train.n=200"]
TOY += ["trainer.preview_every=0", "trainer.evaluate_every=0", "trainer.warmup=2"]
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
LOCAL = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def command(*arguments):
    """The console script in a process of its own."""
    script = Path(sys.executable).with_name("scoresde")
    return subprocess.run([script, *arguments], capture_output=True, text=True, timeout=300, check=False)


def records(stdout):
    """What the jobs of a sweep with --json printed, a line each."""
    return [json.loads(line) for line in stdout.splitlines()]


def settings(run):
    """(seed, steps) of each job that trained, in the order of their directories."""
    configs = [
        yaml.safe_load(path.with_name("config.yaml").read_text()) for path in sorted(run.glob("*/*.safetensors"))
    ]
    return [(config["seed"], config["trainer"]["steps"]) for config in configs]


@pytest.mark.slow
def test_joblib_leaves_what_one_process_after_the_other_does(tmp_path):
    """Of two jobs, and the report of a third one that fails. The options in the middle, as one types them."""
    jobs = [*TOY, "trainer.steps=2,0,3"]
    done = command("train", *jobs, "run=spread", "--multirun", "--json", *JOBLIB)
    assert done.returncode == 2
    assert main(["train", *jobs, "run=here", "--multirun"]) == 2
    spread, here = (sorted((tmp_path / run).glob("*/*.safetensors")) for run in ("spread", "here"))
    assert settings(tmp_path / "spread") == [(0, 2), (0, 3)]
    assert [path.parent.name for path in spread] == [path.parent.name for path in here]
    assert [path.read_bytes() for path in spread] == [path.read_bytes() for path in here]
    said = sorted(records(done.stdout), key=lambda record: record["paths"]["checkpoint"])
    assert [tmp_path / record["paths"]["checkpoint"] for record in said] == spread
    assert [[x for x in record["overrides"] if "steps" in x] for record in said] == [
        ["trainer.steps=2"],
        ["trainer.steps=3"],
    ]
    there, overrides, reported = done.stderr.splitlines()
    assert there.startswith("scoresde train: cannot build scoresde.training.Trainer: steps >= 1")
    assert "'trainer.steps=0'" in overrides
    assert reported == there.replace("scoresde train: ", "scoresde train: a job failed: ")


@pytest.mark.slow
def test_tables_of_jobs_elsewhere_are_printed_here(tmp_path):
    done = command("train", *TOY, "seed=0,1", "trainer.steps=1", "run=sweep", "--multirun", *JOBLIB)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\ncheckpoint ") == 2
    assert settings(tmp_path / "sweep") == [(0, 1), (1, 1)]


@pytest.mark.slow
def test_tasks_of_a_submitted_job_share_it(tmp_path):
    """Two tasks a job, as many processes of torchrun: one log, one record, and one process's weights up to rounding."""
    arguments = ["train", *TOY, "trainer.steps=3", "trainer.log_every=1"]
    tasks = ["seed=0", "run=tasks", "--multirun", "--json", *LOCAL, "hydra.launcher.tasks_per_node=2"]
    done = command(*arguments, *tasks)
    assert done.returncode == 0, done.stderr
    assert main([*arguments, "run=one"]) == 0
    (shared,) = (tmp_path / "tasks").glob("*/checkpoint.safetensors")
    (record,) = records(done.stdout)
    assert "seed=0" in record["overrides"]
    assert tmp_path / record["paths"]["checkpoint"] == shared
    assert (shared.with_name("log.jsonl").read_text()).count('"loss"') == 3
    (tree, info), (alone, its) = load(shared), load(tmp_path / "one" / "checkpoint.safetensors")
    assert info["step"] == its["step"] == 3
    assert tree.keys() == alone.keys()
    for group, tensors in tree.items():
        torch.testing.assert_close(tensors, alone[group], rtol=1e-4, atol=1e-6)


def test_tasks_do_not_share_what_is_not_shared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["convert", "source=edm", "path=x.pt"]) == 2
    assert "one process expected; torchrun shares train, " in capsys.readouterr().err


def test_a_submission_to_slurm_composes(capsys):
    resources = ["hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=8", "hydra.launcher.tasks_per_node=8"]
    assert main(["train", *TOY, "--cfg", "hydra", "hydra/launcher=submitit_slurm", *resources]) == 0
    config = yaml.safe_load(capsys.readouterr().out)["hydra"]
    launcher = config["launcher"]
    assert launcher["_target_"] == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    assert (launcher["partition"], launcher["gpus_per_node"], launcher["tasks_per_node"]) == ("gpu", 8, 8)
    assert config["sweep"]["dir"] == "${run}"  # in it, .submitit has what the jobs say
    assert launcher["submitit_folder"] == "${hydra.sweep.dir}/.submitit/%j"
    assert config["job"]["name"] == "scoresde"


def test_options_may_stand_among_overrides():
    typed = ["a=1", "--multirun", "b=2", "~c", "--config-dir", "my", "+d=3", "--cfg", "job"]
    assert options_first(typed) == ["--multirun", "--config-dir", "my", "--cfg", "job", "a=1", "b=2", "~c", "+d=3"]


def test_a_long_name_of_a_job_is_cut_and_stays_its_own():
    assert file_name("a/b=1,c=2") == "a-b=1,c=2"
    assert file_name("x" * LONGEST_NAME) == "x" * LONGEST_NAME
    one, other = (file_name("é" * 200 + f",seed={seed}") for seed in (0, 1))
    assert one != other
    assert max(len(name.encode()) for name in (one, other)) <= LONGEST_NAME
    assert one.startswith("é" * 100)
