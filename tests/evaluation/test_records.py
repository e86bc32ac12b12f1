"""Lines of metrics.jsonl and likelihoods per sample: none is lost, and each line has its provenance."""

import hashlib
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from scoresde.evaluation import records
from scoresde.evaluation.records import METRICS, append_metrics, commit, keep_per_sample, load_per_sample, provenance
from scoresde.run_config import CONFIG
from scoresde.training.trainer import CHECKPOINT


def lines(run):
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def test_metrics_are_appended_with_their_provenance(tmp_path):
    run = tmp_path / "run"
    for i in range(3):
        assert append_metrics(run, {"i": i, "mean": 0.1 + i}) == run / METRICS
    assert [(row["i"], row["mean"]) for row in lines(run)] == [(i, 0.1 + i) for i in range(3)]
    assert set(lines(run)[0]) == {"i", "mean", "provenance"}
    with pytest.raises(TypeError):
        append_metrics(run, {"i": object()})
    assert [row["i"] for row in lines(run)] == [0, 1, 2]
    assert [path.name for path in run.iterdir()] == [METRICS]


def test_concurrent_commands_lose_no_line(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_metrics(tmp_path, {"i": i}), range(40)))
    assert sorted(row["i"] for row in lines(tmp_path)) == list(range(40))


def test_provenance_has_the_digests_of_the_files_of_the_run_and_the_versions(tmp_path):
    (tmp_path / CONFIG).write_text("name: x\n")
    row = provenance(tmp_path)
    assert row["config"] == hashlib.sha256(b"name: x\n").hexdigest()
    assert (row["checkpoint"], row["torch"], row["device"], row["processes"]) == (None, torch.__version__, "cpu", 1)
    age = datetime.now(UTC) - datetime.fromisoformat(row["date"])
    assert 0 <= age.total_seconds() < 60
    for content in (b"one", b"other"):
        (tmp_path / CHECKPOINT).write_bytes(content)
        assert provenance(tmp_path)["checkpoint"] == hashlib.sha256(content).hexdigest()


def test_the_commit_of_a_checkout_tells_whether_its_files_have_changes(tmp_path):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def current():
        commit.cache_clear()
        return commit(tmp_path)

    assert current() is None
    git("init", "--quiet")
    assert current() is None  # no commit yet
    (tmp_path / "scoresde").mkdir()
    (tmp_path / "scoresde" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    (tmp_path / "notes.txt").write_text("not part of the package")
    head = git("rev-parse", "HEAD")
    assert current() == head
    (tmp_path / "scoresde" / "b.py").write_text("new")
    assert current() == f"{head}-dirty"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()

    def too_slow(*_, **__):
        raise subprocess.TimeoutExpired("git", 1)

    monkeypatch.setenv("PATH", "")
    for run in (subprocess.run, too_slow):
        monkeypatch.setattr(records.subprocess, "run", run)
        commit.cache_clear()
        assert commit(tmp_path) is None


def test_the_likelihood_of_each_sample_is_stored(tmp_path):
    assert load_per_sample(tmp_path, "test.npz") is None
    values = torch.linspace(0, 1, 7, dtype=torch.float64) / 3
    keep_per_sample(tmp_path, "test", torch.arange(3.0))
    path = keep_per_sample(tmp_path, "test", values)
    assert load_per_sample(tmp_path, "test.npz").tolist() == values.tolist()
    assert load_per_sample(tmp_path, "validation.npz") is None
    assert list(path.parent.iterdir()) == [path]


def test_concurrent_processes_store_whole_files(tmp_path, monkeypatch):
    """Jobs of a sweep that evaluate the same run: the later one wins, and no temporary file is shared."""

    class Meanwhile:
        def detach(self):
            """Let another process write the file while this one does."""
            with monkeypatch.context() as patch:
                patch.setattr("os.getpid", lambda: 0)
                keep_per_sample(tmp_path, "test", torch.zeros(1000))
            return torch.ones(1000)

    path = keep_per_sample(tmp_path, "test", Meanwhile())
    assert load_per_sample(tmp_path, "test.npz").tolist() == [1.0] * 1000
    assert list(path.parent.iterdir()) == [path]


def test_a_file_without_likelihoods_is_named(tmp_path):
    path = keep_per_sample(tmp_path, "test", torch.arange(3.0))
    np.savez(path, values=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"must hold float64 values of shape \(N,\); got float64 of shape \(2, 2\)"):
        load_per_sample(tmp_path, "test.npz")
    np.savez(path, values=np.array([{}], dtype=object))
    for content in (path.read_bytes(), b"text", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"test\.npz does not hold likelihoods .*: run `scoresde bpd`"):
            load_per_sample(tmp_path, "test.npz")
