"""The README's code runs as it stands."""

import re
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
    (tmp_path / "points.py").write_text(blocks("python")[1])
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
