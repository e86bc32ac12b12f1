"""The README runs as it stands: every block of code, every command, one after the other in one directory.

Commands keep what they say and get smaller networks, fewer steps and samples behind it, and the CPU for a GPU. What
another machine is needed for (a scheduler's queue, a node's processes) is replaced, and the rest of the command is run.
"""

import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra

from scoresde.cli import config_directory, main
from scoresde.data import CIFAR10
from tests.data.files import RECORDS, contents, levels, write_images
from tests.data.test_cifar import BINARY, write_archive

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)

FEW = ["trainer.preview_every=0", "trainer.evaluate_every=0", "trainer.warmup=1", "trainer.workers=0", "device=cpu"]
TOY = ["trainer.steps=3", "trainer.batch_size=32", "network.width=16", "data.train.n=200", "data.validation.n=20"]
SMALL = ["++network.width=8", "++network.blocks=1", "trainer.batch_size=4", "trainer.steps=2", "trainer.compile=false"]
FACES = ["data.size=32", "network.image_size=32", "++network.multipliers=[1,1,2]"]
TRAINED = {
    "digits": ["network.network.width=8", "trainer.batch_size=16", "trainer.steps=2"],
    "toy2d": [*TOY, "data.test.n=20"],
    "cifar10": SMALL,
    "celebahq256": [*SMALL, *FACES],
    "ffhq1024": [*SMALL, *FACES],
    "table": ["trainer.steps=3", "trainer.batch_size=16"],
    "series": ["trainer.steps=3", "trainer.batch_size=8", "network.width=8"],
    "images": [*SMALL, "trainer.batch_size=8"],
}
BITS = ["likelihood.solver.steps=8", "budget.samples=2", "budget.bound_draws=2"]
SHORT = {
    "bpd": BITS,
    "compare": ["n=12", "nfe=[2,4]", "resamples=4"],
    "evaluate": ["n=24", "features.epochs=1", "sampler.steps=2", *BITS],
    "dequantize": ["steps=2", "batch_size=8", "draws=2", "width=4", "layers=2"],
    "report": [],
    "data": ["data.stride=16"],
    "convert": [],
    "completion": [],
}


def blocks(language, text):
    """The blocks of that language with that text in them."""
    return [block for name, block in BLOCKS if name == language and text in block]


def block(language, text):
    """The only one."""
    (found,) = blocks(language, text)
    return found


def commands(text):
    """Its lines, those that go on on the next one in one, without their comments."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line and not line.startswith("#")]


def value(arguments, key, default=None):
    """What a command sets a key to."""
    return next((x.partition("=")[2] for x in arguments if x.partition("=")[0] == key), default)


def shortened(verb, *arguments):
    """The same command at a hundredth of its cost."""
    if verb in SHORT:
        return [verb, *arguments, *(x for x in SHORT[verb] if not is_of_another(x, arguments))]
    if verb == "sample":
        return [verb, *arguments, "n=3", "device=cpu", *([] if "sampler=ode" in arguments else ["sampler.steps=2"])]
    name = value(arguments, "experiment", "digits")
    family = next(family for family in TRAINED if name.startswith(family))
    kept = [x for x in TRAINED[family] if not (x.startswith(("data.", "network.")) and replaced(arguments, x))]
    return [verb, *arguments, *FEW, *kept]


def replaced(arguments, override):
    """Whether the command takes another option than the experiment's for the group of an override."""
    return value(arguments, override.partition(".")[0]) is not None


def is_of_another(override, arguments):
    """Whether an override is of an option that a command has replaced."""
    likelihood = value(arguments, "likelihood", "default")
    return (override.startswith("likelihood.solver.steps") and likelihood != "default") or (
        override.startswith("data.") and value(arguments, "data") != "patches"
    )


def run(arguments):
    """A command of the README, in this process."""
    assert main(shortened(*arguments)) == 0, arguments


def seeds(run):
    """Those of the jobs of a sweep that trained."""
    paths = Path(run).glob("*/checkpoint.safetensors")
    return sorted(re.findall(r"\bseed=(\d)", path.parent.name)[0] for path in paths)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty directory; CIFAR-10 has few images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(CIFAR10, "records", RECORDS)
    return tmp_path


@pytest.fixture
def session(elsewhere):
    """The runs that the commands read, as those before have left them."""
    run(["train", "experiment=digits"])
    run(["train", "experiment=toy2d", "run=runs/spirals"])
    return elsewhere


def test_every_block_is_run_here():
    """By the test whose words it has; what has no language is output."""
    known = {
        "sh": [
            *(
                "make demo",
                "digits_ve",
                "dequantize",
                "sampler=ode",
                "features=digits",
                "scoresde data",
                "PYTHONPATH",
            ),
            *("convert source", "--json", "cifar10_ddpmpp_subvp data.root", "precision=bf16", "--standalone", "joblib"),
            "SBATCH",
        ],
        "python": ["Langevin(snr=0.16)", "AngularAdams", "class Points", "convert.score_sde"],
        "yaml": ["points.Points}", "points.Network"],
    }
    of_test = [block(language, text) for language, texts in known.items() for text in texts]
    assert sorted(of_test) == sorted(text for language, text in BLOCKS if language)


def test_links_lead_somewhere():
    """To files of the project, and to headings of this page."""
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)
    }
    assert len(targets) > 15
    for target in targets:
        assert target[1:] in headings if target.startswith("#") else (ROOT / target).is_file(), target


def test_two_commands_are_targets_of_the_makefile():
    """The first one trains, samples, measures and reports."""
    text = block("sh", "make demo")
    recipes = [
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _, target in commands(text)
    ]
    assert re.findall(r"scoresde (\w+)", recipes[0])[-4:] == ["train", "sample", "bpd", "report"]
    assert "pytest" in recipes[1]


@pytest.mark.slow
def test_the_library_in_twenty_lines(capsys):
    exec(compile(block("python", "Langevin(snr=0.16)"), "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_a_sampler_in_a_few_lines(capsys):
    exec(compile(block("python", "AngularAdams"), "README.md", "exec"), {})
    assert " 10 torch.Size([10, 16, 2])" in capsys.readouterr().out


@pytest.mark.slow
def test_train(elsewhere):
    for _, *arguments in commands(block("sh", "digits_ve")):
        run(arguments)
    assert Path("runs/digits_ve/checkpoint.safetensors").is_file()
    assert Path("runs/spirals/checkpoint.safetensors").is_file()
    assert seeds("runs/seeds") == ["1", "2", "3"]


@pytest.mark.slow
def test_bits_per_dimension(session, capsys):
    for _, *arguments in commands(block("sh", "dequantize")):
        run(arguments)
    said = capsys.readouterr().out
    assert said.count("test bits/dim") == 2
    assert said.count("test nats/dim") == 1


@pytest.mark.slow
def test_sample_and_compare(session):
    for _, *arguments in commands(block("sh", "sampler=ode")):
        run(arguments)
    assert np.load("runs/spirals/samples/ode.npy").shape == (3, 2)
    assert Path("runs/digits/figures/comparison.png").is_file()
    assert Path("runs/oracle/comparison.csv").is_file()


@pytest.mark.slow
def test_evaluate_and_report(session):
    for _, *arguments in commands(block("sh", "features=digits")):
        run(arguments)
    assert "</html>" in Path("runs/digits/report.html").read_text()


@pytest.mark.slow
def test_data_of_ones_own(elsewhere, capsys):
    np.savetxt("my.csv", np.random.default_rng(0).normal(size=(200, 5)), delimiter=",", header="a,b,c,d,e", comments="")
    np.save("my.npy", np.random.default_rng(0).normal(size=(60, 2, 64)).astype(np.float32))
    write_images(Path("pictures"), {f"{i:03d}.png": levels(40, 36, seed=i) for i in range(60)})
    for _, *arguments in commands(block("sh", "scoresde data")):
        run(arguments)
    said = capsys.readouterr().out
    assert "3 x 16 x 16" in said
    assert all(Path("runs", name, "checkpoint.safetensors").is_file() for name in ("table", "series", "images"))


@pytest.mark.slow
def test_a_dataset_and_a_network_of_ones_own(elsewhere, monkeypatch, capsys):
    Path("points.py").write_text(block("python", "class Points"))
    for text, path in (("points.Points}", "data/points.yaml"), ("points.Network", "network/small.yaml")):
        Path("my", path).parent.mkdir(parents=True, exist_ok=True)
        Path("my", path).write_text(block("yaml", text))
    (export, setting), *lines = commands(block("sh", "PYTHONPATH"))
    assert (export, setting) == ("export", "PYTHONPATH=.")
    monkeypatch.syspath_prepend(".")
    short = {"train": ["trainer.steps=20", "trainer.batch_size=64"], "sample": ["sampler.steps=5"], "bpd": BITS[:1]}
    for _, verb, *arguments in lines:
        assert main([verb, *arguments, *short.pop(verb)]) == 0
    assert "test nats/dim" in capsys.readouterr().out
    assert Path("runs/points/figures/samples_pc.png").is_file()


@pytest.mark.slow
def test_models_trained_elsewhere(elsewhere):
    """The lines of Python, and the commands with fewer steps, on a checkpoint of score_sde."""
    source = Path(__file__).parent / "data" / "score_sde" / "ddpmpp_vp_continuous"
    for suffix in (".pth", ".config.json"):
        shutil.copy(source.with_suffix(suffix), f"checkpoint_8{suffix}")
    exec(compile(block("python", "convert.score_sde"), "README.md", "exec"), {})
    convert, sample, bpd = commands(block("sh", "convert source"))
    run(convert[1:])
    run(sample[1:])
    assert Path("runs/theirs/figures/samples_published_vp.png").is_file()
    assert bpd[:3] == ["scoresde", "bpd", "run=runs/theirs"]  # its CIFAR-10 is of 16 x 16 pixels, which there is not


@pytest.mark.slow
def test_the_command_line(session, capsys):
    usage, told, machine, completion = commands(block("sh", "--json"))
    assert main(usage[1:]) == 0
    assert main(told[1:]) == 0
    run(machine[1:])
    assert capsys.readouterr().out.rstrip().endswith("}")
    name, script = completion
    assert name == "eval"
    assert main(re.findall(r"^\$\(scoresde (.*)\)$", script)[0].split()) == 0
    assert "complete" in capsys.readouterr().out


# --- one GPU, one node, a cluster


@pytest.fixture
def files(elsewhere, monkeypatch):
    """CIFAR-10 where it is looked for, and faces in a folder and an archive."""
    write_archive(elsewhere / "datasets" / "cifar10", monkeypatch, BINARY, contents())
    write_images(elsewhere / "faces", {f"{i:05d}.png": levels(36, 40, seed=i) for i in range(40)})
    shutil.make_archive("faces", "zip", "faces")
    return elsewhere


@pytest.mark.slow
def test_one_gpu(files):
    for text in ("cifar10_ddpmpp_subvp data.root", "precision=bf16"):
        for _, *arguments in commands(block("sh", text)):
            shutil.rmtree("runs", ignore_errors=True)
            run(arguments)


@pytest.mark.slow
def test_one_node(files):
    """What each process is told to do; that they share it is tested in tests/training/test_distributed.py."""
    for torchrun, *rest in commands(block("sh", "--standalone")):
        there = rest.index("-m")
        assert [torchrun, *rest[:there]] == ["torchrun", "--standalone", "--nproc-per-node", "8"]
        assert rest[there : there + 2] == ["-m", "scoresde"]
        arguments = rest[there + 2 :]
        if arguments[0] in ("bpd", "evaluate"):  # a likelihood of images of 32 x 32 is too much for this
            composed(arguments)
        else:
            run(arguments)


def composed(arguments):
    """The configuration of a command, with Hydra's own part."""
    GlobalHydra.instance().clear()
    options = [x for x in arguments[1:] if x != "--multirun"]
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        return hydra.compose(arguments[0], overrides=options, return_hydra_config=True)


@pytest.mark.slow
def test_sweeps(elsewhere):
    """joblib's jobs one after the other; a queue's configuration."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (_, *here), (_, *queue) = commands(block("sh", "joblib"))
    run([*here, "hydra.launcher.n_jobs=1"])
    assert seeds("runs/toy2d") == ["0", "1", "2"]
    single = [re.sub(r"^(sde|seed)=(\w+),.*", r"\1=\2", x) for x in queue]
    launcher = composed(single).hydra.launcher
    assert (launcher.partition, launcher.gpus_per_node, launcher.timeout_min) == ("gpu", 1, 1440)


@pytest.mark.slow
def test_several_nodes(files, monkeypatch):
    """The script, where SLURM's commands and torchrun say what they were told, and the command that they start."""
    Path("bin").mkdir()
    for name, line in {
        "scontrol": "echo first; echo second",
        "srun": '"$@"',
        "torchrun": 'printf "%s\\n" "$@"',
    }.items():
        script = Path("bin", name)
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:/usr/bin:/bin")
    for name, text in {"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NNODES": "4", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, text)
    done = subprocess.run(["bash", "-eu"], input=block("sh", "SBATCH"), capture_output=True, text=True, check=True)
    told = done.stdout.split()
    assert told[told.index("--nnodes") + 1] == "4"
    assert told[told.index("--rdzv-endpoint") + 1] == "first:29500"
    run(told[told.index("scoresde") + 1 :])
