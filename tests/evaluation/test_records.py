"""Lines of metrics.jsonl: all of them kept, and each with where it came from."""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from scoresde.build import CONFIG
from scoresde.evaluation import records
from scoresde.evaluation.records import (
    METRICS,
    append_metrics,
    commit,
    digest,
    keep_per_sample,
    load_per_sample,
    provenance,
)
from scoresde.training.trainer import CHECKPOINT


def lines(run):
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def test_metrics_are_appended_with_their_provenance(tmp_path):
    run = tmp_path / "run"
    for i in range(3):
        assert append_metrics(run, {"i": i, "mean": 0.1 + i}) == run / METRICS
    found = lines(run)
    assert [(row["i"], row["mean"]) for row in found] == [(i, 0.1 + i) for i in range(3)]
    assert set(found[0]) == {"i", "mean", "provenance"}
    with pytest.raises(TypeError):
        append_metrics(run, {"i": object()})
    assert [row["i"] for row in lines(run)] == [0, 1, 2]
    assert [path.name for path in run.iterdir()] == [METRICS]


def test_metrics_of_commands_at_the_same_time_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_metrics(tmp_path, {"i": i}), range(40)))
    assert sorted(row["i"] for row in lines(tmp_path)) == list(range(40))


def test_provenance_names_the_files_of_the_run_and_the_versions(tmp_path):
    (tmp_path / CONFIG).write_text("name: x\n")
    found = provenance(tmp_path)
    assert found["config"] == hashlib.sha256(b"name: x\n").hexdigest()
    assert found["checkpoint"] is None
    assert found["torch"] == torch.__version__
    assert (found["device"], found["processes"]) == ("cpu", 1)
    age = datetime.now(UTC) - datetime.fromisoformat(found["date"])
    assert 0 <= age.total_seconds() < 60
    (tmp_path / CHECKPOINT).write_bytes(b"one")
    first = provenance(tmp_path)["checkpoint"]
    (tmp_path / CHECKPOINT).write_bytes(b"other")
    assert provenance(tmp_path)["checkpoint"] == hashlib.sha256(b"other").hexdigest() != first
    assert digest(tmp_path / "missing") is None


def test_the_commit_of_a_checkout_and_whether_its_files_are_those(tmp_path):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(tmp_path / "nowhere") is None
    git("init", "--quiet")
    commit.cache_clear()
    assert commit(tmp_path) is None  # no commit yet
    (tmp_path / "scoresde").mkdir()
    (tmp_path / "scoresde" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    commit.cache_clear()
    head = git("rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "notes.txt").write_text("no part of the package")
    commit.cache_clear()
    assert commit(tmp_path) == head
    (tmp_path / "scoresde" / "b.py").write_text("new")
    commit.cache_clear()
    assert commit(tmp_path) == f"{head}-dirty"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    commit.cache_clear()
    assert commit(tmp_path) is None
    monkeypatch.setattr(
        records.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(subprocess.TimeoutExpired("git", 1))
    )
    commit.cache_clear()
    assert commit(tmp_path) is None


def test_the_likelihood_of_each_sample_is_kept(tmp_path):
    assert load_per_sample(tmp_path, "test") is None
    values = torch.linspace(0, 1, 7, dtype=torch.float64) / 3
    keep_per_sample(tmp_path, "test", torch.arange(3.0))
    path = keep_per_sample(tmp_path, "test", values)
    assert load_per_sample(tmp_path, "test").tolist() == values.tolist()
    assert load_per_sample(tmp_path, "validation") is None
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_holds_no_likelihoods_is_named(tmp_path):
    path = keep_per_sample(tmp_path, "test", torch.arange(3.0))
    np.savez(path, values=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"values \(N,\) in float64 .* expected; got float64 \(2, 2\)"):
        load_per_sample(tmp_path, "test")
    for content in (b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"test\.npz is no likelihood of samples; `scoresde bpd` writes it anew"):
            load_per_sample(tmp_path, "test")
    np.savez(path, values=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="is no likelihood of samples"):
        load_per_sample(tmp_path, "test")


MANY = """
import sys, torch
from pathlib import Path
from scoresde.evaluation.records import keep_per_sample
for n in range(60):
    keep_per_sample(Path("."), "test", torch.full((1000,), float(sys.argv[1])))
"""


@pytest.mark.slow
def test_processes_at_the_same_time_leave_the_values_of_one(tmp_path):
    """Jobs of a sweep that measure one run: none fails, and none mixes its file with another's."""
    jobs = [subprocess.Popen([sys.executable, "-c", MANY, value], cwd=tmp_path) for value in ("1", "2")]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    assert load_per_sample(tmp_path, "test").tolist() in ([1.0] * 1000, [2.0] * 1000)
    assert [path.name for path in (tmp_path / "per_sample").iterdir()] == ["test.npz"]
