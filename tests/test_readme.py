"""The README's code runs as it stands."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_library_in_twenty_lines(capsys):
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


@pytest.mark.slow
def test_data_of_ones_own(tmp_path):
    """The dataset, its configuration and the commands, with fewer steps."""
    (tmp_path / "points.py").write_text(next(block for block in blocks("python") if "class Points" in block))
    (tmp_path / "my" / "data").mkdir(parents=True)
    (tmp_path / "my" / "data" / "points.yaml").write_text(blocks("yaml")[0])
    commands = next(block for block in blocks("sh") if "PYTHONPATH" in block)
    short = {"train": "trainer.steps=20 trainer.batch_size=64", "sample": "n=8 sampler.steps=5", "bpd": ""}
    for verb, overrides in short.items():
        commands = re.sub(rf"^(scoresde {verb} .*)$", rf"\1 {overrides}", commands, flags=re.MULTILINE)
    commands = commands.replace("scoresde ", f"{sys.executable} -m scoresde ")
    done = subprocess.run(["sh", "-ec", commands], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "test nats/dim" in done.stdout
    assert (tmp_path / "runs" / "points" / "figures" / "samples_pc.png").is_file()


@pytest.mark.slow
def test_models_trained_elsewhere(tmp_path, monkeypatch):
    """The lines of Python, and the commands with fewer steps, on a checkpoint of score_sde."""
    source = Path(__file__).parent / "data" / "score_sde" / "ddpmpp_vp_continuous"
    for suffix in (".pth", ".config.json"):
        shutil.copy(source.with_suffix(suffix), tmp_path / f"checkpoint_8{suffix}")
    monkeypatch.chdir(tmp_path)
    exec(compile(next(block for block in blocks("python") if "convert" in block), "README.md", "exec"), {})
    commands = next(block for block in blocks("sh") if "scoresde convert" in block)
    convert, sample, bpd = commands.strip().splitlines()
    assert bpd.startswith("scoresde bpd")  # its CIFAR-10 is not here
    for command in (convert, f"{sample} sampler.steps=3 n=2"):
        done = subprocess.run(
            command.replace("scoresde", f"{sys.executable} -m scoresde", 1).split(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "theirs" / "figures" / "samples_published_vp.png").is_file()


def test_a_sampler_in_a_few_lines(capsys):
    exec(compile(next(block for block in blocks("python") if "AngularAdams" in block), "README.md", "exec"), {})
    assert " 10 torch.Size([10, 16, 2])" in capsys.readouterr().out
