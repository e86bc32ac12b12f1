"""README and the pages in docs/ run as they stand: every block of code and every command.

Commands keep what they say and get smaller networks, fewer steps and samples, and the CPU in place of a GPU. Where a
command needs another machine (a scheduler's queue, several nodes), that part is replaced and the rest of it runs.
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
from scoresde.data import CIFAR10, openmoji
from scoresde.data.datasets import SPLITS
from scoresde.networks import MLP
from tests.contrastive_run import write_contrastive, write_stages
from tests.data.files import RECORDS, contents, levels, write_images
from tests.data.test_cifar import BINARY, write_archive

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = list(dict.fromkeys(re.findall(r"```(\w*)\n(.*?)```", "\n".join(PAGES.values()), flags=re.DOTALL)))

VERBS = "nfe=[5,10,20]\nscoresde evaluate"  # in the commands of docs/start.md
EVALUATION = next(c for language, c in BLOCKS if language == "sh" and c.startswith("scoresde evaluate"))

FEW = ["trainer.preview_every=0", "trainer.evaluate_every=0", "trainer.warmup=1", "trainer.workers=0", "device=cpu"]
TOY = ["trainer.steps=3", "trainer.batch_size=32", "network.width=16", "data.train.n=200", "data.validation.n=8"]
SMALL = ["++network.width=8", "++network.blocks=1", "trainer.batch_size=4", "trainer.steps=2", "trainer.compile=false"]
FACES = ["data.size=32", "++network.multipliers=[1,1,2]"]
PICTURES = ["trainer.steps=2", "trainer.batch_size=4", "network.width=4", "data=image_folder", "data.root=pictures"]
PICTURES += ["data.size=8", "data.low=-1.0", "data.training=null"]
TRAINED = {
    "openmoji_text": ["network.width=8", "network.multipliers=[1,2]", "trainer.batch_size=8", "trainer.steps=2"],
    "digits_classifier": ["network.width=8", "network.attention=[]", "trainer.batch_size=16", "trainer.steps=2"],
    "digits": [
        "network.network.width=8",
        "network.network.multipliers=[1]",
        "network.network.attention=[]",
        "trainer.batch_size=16",
        "trainer.steps=2",
    ],
    "toy2d": [*TOY, "data.test.n=8"],
    "flow_map_2d": [*TOY, "data.test.n=8"],
    "gan_2d": [*TOY, "data.test.n=8", "generator.steps=2"],
    "cifar10": [*SMALL, "++network.multipliers=[1,2]"],
    "celebahq256": [*SMALL, *FACES],
    "ffhq1024": [*SMALL, *FACES],
    "table": ["trainer.steps=3", "trainer.batch_size=16"],
    "series": ["trainer.steps=2", "trainer.batch_size=8", "network.width=8", "network.multipliers=[1]"],
    "image": [*SMALL, "network.multipliers=[1]"],
    "volumes": [*SMALL, "network.multipliers=[1]"],
    "openmoji_autoencoder": [*PICTURES, "network.multipliers=[1,2]"],
    "openmoji_latent": [*PICTURES, "network.attention=[]"],
}
FEATURES = ["features.epochs=1", "features.width=4", "features.batch_size=256"]
MULTILEVEL = ["likelihood.tolerance=1", "likelihood.levels=[2,4]"]
BITS = ["likelihood.solver.steps=2", "budget.samples=2", "budget.bound_draws=2", *MULTILEVEL]
SHORT = {
    "bpd": BITS,
    "classify": ["likelihood.solver.steps=2", "likelihood.trace.probes=1", "bound.draws=4", "bound.rounds=1"],
    "score": ["likelihood.solver.steps=2"],
    "compare": ["n=8", "nfe=[4]", "resamples=4", *FEATURES],
    "evaluate": ["n=8", "sampler.steps=2", *FEATURES, *BITS],
    "dequantize": ["steps=2", "batch_size=8", "draws=2", "width=4", "layers=2"],
    "distill": [
        "method.steps=2",
        "method.batch_size=4",
        "method.objective.steps=4",
        "method.pool=8",
        "method.held_out=4",
        "method.target_steps=8",
    ],
    "report": ["film_steps=2", "film_frames=2"],
    "data": ["data.stride=16"],
    "convert": [],
    "completion": [],
}


def block(language, text):
    """The only block of that language that contains the text."""
    (content,) = [content for name, content in BLOCKS if name == language and text in content]
    return content


def commands(text):
    """The commands of a block as lists of words: continued lines joined, comments dropped."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line and not line.startswith("#")]


def value(arguments, key, default=None):
    """The value that a command gives to a key."""
    return next((x.partition("=")[2] for x in arguments if x.partition("=")[0] == key), default)


def shortened(verb, *arguments):
    """The command at a hundredth of its cost."""
    if verb in SHORT:
        return [verb, *arguments, *(x for x in SHORT[verb] if not is_of_another(x, arguments))]
    if verb == "restore":
        is_own = value(arguments, "posterior") in ("ddrm", "particles")
        return [verb, *arguments, "n=3", "particles=4", "posterior.steps=2" if is_own else "sampler.steps=2"]
    if verb == "sample":
        return [
            verb,
            *arguments,
            "n=3",
            "device=cpu",
            *(["sampler.steps=2"] if value(arguments, "sampler") not in ("ode", "learned") else []),
        ]
    name = value(arguments, "experiment", "digits")
    family = next(family for family in TRAINED if name.startswith(family))  # the longest come first
    kept = [x for x in TRAINED[family] if not (x.startswith(("data.", "network.")) and replaced(arguments, x))]
    return [verb, *arguments, *FEW, *kept]


def replaced(arguments, override):
    """Whether the command chooses another option for the group of an override."""
    return value(arguments, override.partition(".")[0]) is not None


def is_of_another(override, arguments):
    """Whether an override belongs to an option that the command has replaced."""
    likelihood, is_solver = value(arguments, "likelihood", "default"), value(arguments, "method") is None
    return (
        (override.startswith("likelihood.solver.steps") and likelihood not in ("default", "exact"))
        or (override in MULTILEVEL and likelihood != "multilevel")
        or (override.startswith("data.") and value(arguments, "data") != "patches")
        or (override.startswith("features.") and value(arguments, "features") is None)
        or (override.startswith("nfe=") and "learned" in value(arguments, "samplers", ""))  # those that were learned
        or (override.startswith("method.objective") and is_solver)
        or (override.startswith(("method.pool", "method.held_out", "method.target")) and not is_solver)
    )


def run(arguments):
    """Run a command in this process."""
    assert main(shortened(*arguments)) == 0, arguments


def seeds(run):
    """The seeds of the jobs of a sweep that finished."""
    paths = Path(run).glob("*/checkpoint.safetensors")
    return sorted(re.findall(r"\bseed=(\d)", path.parent.name)[0] for path in paths)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, quick_figures):
    """An empty directory; CIFAR-10 and the test set of the digits have few images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(CIFAR10, "records", RECORDS)
    monkeypatch.setitem(SPLITS, "test", slice(1500, 1508))
    return tmp_path


def test_every_block_is_run_here():
    """Each block belongs to the test that finds it by a text; blocks without a language are output."""
    texts = {
        "sh": [
            *(
                "make demo",
                VERBS,
                "hidden part",
                "data=patches",
                "iris.csv",
                "data=image_folder",
                "run=runs/series",
                "digits_ve",
                "dequantize",
                "conditional=false",
                "sampler=ode",
            ),
            *("convert source", "--json", "cifar10_ddpmpp_subvp data.root", "precision=bf16", "--standalone", "joblib"),
            *(
                "method=trajectories",
                "sampler=learned",
                "experiment=gan_2d",
                "SBATCH",
                "PYTHONPATH",
                "guidance.classifier=",
                "# or data.labels",
                "operator=downsampling",
                "run=runs/ring",
                "loss=super_resolution",
                "experiment=openmoji_latent",
                "experiment=openmoji_text",
            ),
        ],
        "python": [
            *("Langevin(snr=0.16)", "trajectory=True", "ClassifierFree", "class Points", "convert.score_sde"),
            "UnCLIP(",
            *(
                "oracle.posterior(operator",
                "posterior_moments",
                "TrajectoryDistillation",
                "samplers.learn(",
                "add_lora",
            ),
            *("make_moons", "2 * np.pi", "load_iris", "torch.uint8", "Inpainting(measured"),
            "CascadeStage",
            "class Rotation",
        ],
        "yaml": ["points.Points}", "points.Network"],
    }
    known = {block(language, text) for language, parts in texts.items() for text in parts} | {EVALUATION}
    assert known == {content for language, content in BLOCKS if language}


def test_links_lead_somewhere():
    """To files of the project and to headings of the page."""
    for path, text in PAGES.items():
        headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if "://" not in target:
                found = target[1:] in headings if target.startswith("#") else (path.parent / target).exists()
                assert found, (path.name, target)


def test_the_readme_is_short():
    assert len(PAGES[ROOT / "README.md"].split()) <= 900


def test_two_commands_are_targets_of_the_makefile():
    """The first one trains, samples, measures and reports."""
    recipes = [
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _, target in commands(block("sh", "make demo"))
    ]
    assert re.findall(r"scoresde (\w+)", recipes[0])[-4:] == ["train", "sample", "bpd", "report"]
    assert "pytest" in recipes[1]


def test_the_python_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = block("python", "make_moons").replace("steps=1000", "steps=20").replace("4000", "400").replace("500", "20")
    exec(compile(short, "README.md", "exec"), {})
    assert "status       20 OK" in capsys.readouterr().out


@pytest.mark.slow
def test_a_loop_of_ones_own(capsys):
    short = block("python", "Langevin(snr=0.16)").replace("range(200)", "range(5)").replace("steps=100", "steps=3")
    short = short.replace("ExactTrace())", "ExactTrace(), solver=ss.solvers.Adams(6))")
    exec(compile(short, "docs/training.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_samplers_in_a_few_lines(capsys):
    names = {}
    exec(compile(block("python", "trajectory=True"), "docs/sampling.md", "exec"), names)
    assert " 10 torch.Size([10, 16, 2])" in capsys.readouterr().out
    short = block("python", "samplers.learn(").replace(
        "steps=100, batch_size=32, pool=256, held_out=64", "steps=2, batch_size=4, pool=8, held_out=4, target_steps=8"
    )
    exec(compile(short, "docs/sampling.md", "exec"), names)
    assert capsys.readouterr().out.startswith("5 ")


@pytest.mark.slow
def test_one_run_through_every_verb(elsewhere, capsys):
    """The verbs of the start, then the pages on likelihood, sampling and the command line, on the same two runs."""
    verbs = commands(block("sh", VERBS))
    assert all(command in verbs for command in commands(EVALUATION))
    for _, *arguments in verbs:
        run(arguments)
    assert "</html>" in Path("runs/digits/report.html").read_text()
    run(["train", "experiment=toy2d", "run=runs/spirals"])
    capsys.readouterr()
    for _, *arguments in commands(block("sh", "dequantize")):
        run(arguments)
    printed = capsys.readouterr().out
    assert (printed.count("test bits/dim"), printed.count("test nats/dim")) == (2, 1)
    for _, *arguments in commands(block("sh", "sampler=ode")):
        run(arguments)
    (array,) = Path("runs/spirals/samples").glob("ode_n3_*.npy")
    assert np.load(array).shape == (3, 2)
    for _, *arguments in commands(block("sh", "sampler=learned")):
        run(arguments)
    assert sorted(path.name for path in Path("runs/spirals/solvers").iterdir()) == [
        f"nfe{n}.safetensors" for n in (5, 7)
    ]
    assert list(Path("runs/digits/figures").glob("comparison*.png"))
    assert list(Path("runs/oracle").glob("comparison*.csv"))
    usage, settings, machine, (name, script) = commands(block("sh", "--json"))
    assert main(usage[1:]) == 0
    assert main(settings[1:]) == 0
    run(machine[1:])
    assert capsys.readouterr().out.rstrip().endswith("}")
    assert name == "eval"
    assert main(re.findall(r"^\$\(scoresde (.*)\)$", script)[0].split()) == 0
    assert "complete" in capsys.readouterr().out


def test_a_guided_model_in_a_few_lines(elsewhere, capsys):
    short = block("python", "ClassifierFree").replace("steps=1000", "steps=2").replace("200", "4")
    exec(compile(short, "docs/conditions.md", "exec"), {})
    evaluations = re.findall(r"^[\d.]+ (\d+) tensor", capsys.readouterr().out, re.M)
    assert evaluations == ["100", "200", "200"]


@pytest.mark.filterwarnings("ignore::scoresde.prior_mismatch.PriorMismatch")  # the network is not trained
def test_a_forecast_in_python(elsewhere, capsys):
    short = block("python", "Inpainting(measured").replace("steps=500", "steps=2").replace("n=8", "n=2")
    short = short.replace("width=16", "width=4").replace(
        "range(8)", "range(2), sampler=ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=3)"
    )
    exec(compile(short, "docs/series.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tensor")


def test_pictures_from_captions_by_way_of_their_embeddings(elsewhere, capsys):
    """The runs are small, and have not been trained."""
    captions = ["firefighter dark skin tone", "cat face"]
    runs = [Path(f"runs/openmoji_{name}") for name in ("prior", "unclip", "contrastive")]
    write_stages(*runs[:2], write_contrastive(runs[2], captions))
    exec(compile(block("python", "UnCLIP("), "docs/embeddings.md", "exec"), {})
    shape, variations, between, *similarities = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([8, 1, 8, 8]) 84"  # both stages, 20 steps and the final denoising, guided
    assert (variations, between) == ("torch.Size([8, 1, 8, 8])", "torch.Size([5, 1, 1, 8, 8])")
    assert len(similarities) == 8


def test_a_posterior_in_a_few_lines(capsys):
    names: dict[str, object] = {}
    for text in ("oracle.posterior(operator", "posterior_moments"):
        exec(compile(block("python", text), "docs/inverse.md", "exec"), names)
    assert "torch.Size([16, 2])" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::scoresde.prior_mismatch.PriorMismatch")  # the networks are not trained
def test_a_cascade_in_a_few_lines(capsys):
    exec(compile(block("python", "CascadeStage"), "docs/cascades.md", "exec"), {})
    assert capsys.readouterr().out.startswith("torch.Size([4, 3, 16, 16]) [8, 16] 8\n")


@pytest.mark.slow
def test_a_cascade_of_pictures(elsewhere, monkeypatch):
    """Few pictures: the likelihood of images of 32 x 32 is expensive."""
    write_images(Path("pictures"), {f"{i:03d}.png": levels(40, 36, seed=i) for i in range(60)})
    *others, bits = [arguments for _, *arguments in commands(block("sh", "loss=super_resolution"))]
    for arguments in others:
        run(arguments)
    (array,) = Path("runs/pictures32/samples").glob("*.npy")
    assert np.load(array).shape == (3, 3, 32, 32)
    assert main([*bits, "likelihood.solver.steps=2"]) == 0
    assert "cascade_likelihood" in Path("runs/pictures32/metrics.jsonl").read_text()


@pytest.mark.slow
def test_generators_and_adapters(elsewhere, capsys):
    exec(compile(block("python", "add_lora"), "docs/flow_maps.md", "exec"), {})
    shape, trained = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([16, 2])"
    assert 0 < int(trained) < sum(parameter.numel() for parameter in MLP(2, width=64).parameters())
    for _, *arguments in commands(block("sh", "experiment=gan_2d")):
        run(arguments)
    (array,) = Path("runs/gan/samples").glob("gan_*.npy")
    assert np.isfinite(np.load(array)).all()


@pytest.mark.slow
def test_flow_maps(elsewhere, capsys):
    exec(compile(block("python", "TrajectoryDistillation"), "docs/flow_maps.md", "exec"), {})
    assert "torch.Size([16, 2]) True" in capsys.readouterr().out
    for _, *arguments in commands(block("sh", "method=trajectories")):
        run(arguments)
    (array,) = Path("runs/points/flow_map/samples").glob("flow_map_*.npy")
    assert np.load(array).shape == (3, 2)
    assert "approximate, by a learned map" in capsys.readouterr().out


@pytest.mark.slow
def test_restorations(elsewhere):
    """A photograph, a mask and a measurement from files."""
    run(["train", "experiment=digits", "run=runs/digits"])
    write_images(elsewhere, {"photo.png": levels(20, 30), "mask.png": np.uint8(255) * (levels(8, 8, 1) > 99)})
    np.save("y.npy", np.zeros((1, 48)))
    for _, *arguments in commands(block("sh", "operator=downsampling")):
        run(arguments)
    assert len(list(Path("runs/digits/figures").glob("restored_*.png"))) == 5
    assert sum('"psnr"' in line for line in Path("runs/digits/metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_latents(elsewhere, capsys):
    """The bound of an exact autoencoder, and both trainings on small pictures in place of OpenMoji."""
    exec(compile(block("python", "class Rotation"), "docs/latents.md", "exec"), {})
    bound, pixels = capsys.readouterr().out.split()[:2]
    assert float(bound) == pytest.approx(float(pixels), abs=2e-3)
    write_images(elsewhere / "pictures", {f"{i}.png": levels(8, 8, seed=i) for i in range(150)})
    for _, *arguments in commands(block("sh", "experiment=openmoji_latent")):
        run(arguments)
    printed = capsys.readouterr().out
    assert printed.count("test bits/dim") == 1
    assert "KL(q || p)" in printed


def test_commands_shown_twice_are_those_of_the_pages_that_run_them():
    texts = (VERBS, "guidance.classifier=", "conditional=false", "operator=downsampling", "data=image_folder")
    pages = {tuple(words) for text in texts for words in commands(block("sh", text))}
    for text in ("# or data.labels", "hidden part"):
        assert {*map(tuple, commands(block("sh", text)))} <= pages


@pytest.mark.slow
def test_conditions(elsewhere, capsys):
    for _, *arguments in commands(block("sh", "guidance.classifier=")):
        run(arguments)
    (array,) = Path("runs/digits_cond/samples").glob("*all*.npy")
    assert np.load(array).shape == (30, 1, 8, 8)
    assert list(Path("runs/digits_cond/figures").glob("guidance*.png"))
    assert "class_accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_texts(elsewhere, monkeypatch, capsys):
    """On noise in place of the pictures, which take seconds to draw; the folder of a T5 encoder is missing."""
    path, shape = elsewhere / "pictures.npy", (len(openmoji._emoji()[0]), 3, 16, 16)
    np.save(path, np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8))
    monkeypatch.setattr(openmoji, "draw", lambda size, root: path)
    train, caption, captions, pretrained = (words[1:] for words in commands(block("sh", "experiment=openmoji_text")))
    for words in (train, caption, captions):
        run(words)
    pictures = sorted(Path("runs/openmoji_text/figures").glob("samples_*.png"))
    assert len(pictures) == 2
    capsys.readouterr()
    assert main(pretrained) == 2
    assert "got 'models/t5': `hf download models/t5` fetches a model of that name" in capsys.readouterr().err


@pytest.mark.slow
def test_labels_from_training_to_classification(elsewhere, capsys):
    for _, *arguments in commands(block("sh", "conditional=false")):
        run(arguments)
    printed = capsys.readouterr().out
    assert (printed.count("test bits/dim"), printed.count("of the label"), printed.count("test accuracy")) == (2, 1, 2)
    assert len(list(Path("runs/digits_cond/figures").glob("*confusion.png"))) == 2


def test_training_in_python(elsewhere, capsys):
    """With fewer steps and samples, then the command line on the same run."""
    text = block("python", "2 * np.pi").replace("steps=1000", "steps=20").replace("4000", "400").replace("500", "20")
    exec(compile(text, "docs/training.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("Run('runs/ring', model=ScoreModel(network=MLP(shape=2), ")
    assert "Samples: 20 samples" in printed
    assert "status       20 OK" in printed
    for _, *arguments in commands(block("sh", "run=runs/ring")):
        run([*arguments, "film=false"] if arguments[0] == "report" else arguments)
    assert "test nats/dim" in capsys.readouterr().out
    assert Path("runs/ring/report.html").is_file()


@pytest.mark.slow
def test_train(elsewhere):
    for _, *arguments in commands(block("sh", "digits_ve")):
        run(arguments)
    assert Path("runs/digits_ve/checkpoint.safetensors").is_file()
    assert Path("runs/spirals/checkpoint.safetensors").is_file()
    assert seeds("runs/seeds") == ["1", "2", "3"]
    assert Path("runs/seeds/sweep_bpd.csv").read_text().splitlines()[1].startswith("3,")  # one row of three seeds
    assert Path("runs/seeds/report.html").is_file()


@pytest.mark.slow
def test_data_of_ones_own(elsewhere, capsys):
    """The tutorials on a table, pictures and series."""
    np.save("my.npy", np.random.default_rng(0).normal(size=(60, 2, 64)).astype(np.float32))
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (60, 1, 6, 6), dtype=np.uint8))
    np.save("volumes.npy", np.random.default_rng(0).normal(size=(60, 2, 4, 4, 4)))
    write_images(Path("pictures"), {f"{i:03d}.png": levels(40, 36, seed=i) for i in range(60)})
    exec(compile(block("python", "load_iris"), "docs/table.md", "exec"), {})
    for text in ("data=patches", "iris.csv", "data=image_folder", "run=runs/series"):
        for _, *arguments in commands(block("sh", text)):
            run(arguments)
    printed = capsys.readouterr().out
    assert "3 x 16 x 16" in printed
    assert (printed.count("test nats/dim"), printed.count("test bits/dim"), printed.count("test accuracy")) == (3, 1, 1)
    (rows,) = Path("runs/iris/samples").glob("*all*.npy")
    assert np.load(rows).shape == (9, 4)
    assert rows.with_suffix(".csv").read_text().splitlines()[0].endswith("petal length,petal width,species")
    (scores,) = Path("runs/iris/scores").glob("all*.csv")
    assert len(scores.read_text().splitlines()) == 151
    assert Path("scores.parquet").is_file()
    names = ("iris", "series", "images", "image_arrays", "volumes")
    assert all(Path("runs", name, "checkpoint.safetensors").is_file() for name in names)


def test_pictures_in_python(elsewhere, capsys):
    short = block("python", "torch.uint8").replace("steps=500", "steps=3").replace("width=16", "width=8")
    short = short.replace("images[:4]", "images[:1]").replace("data_map)", "data_map, solver=ss.solvers.Adams(4))")
    exec(compile(short, "docs/pictures.md", "exec"), {})
    assert "bits/dim" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dataset_and_a_network_of_ones_own(elsewhere, monkeypatch, capsys):
    Path("points.py").write_text(block("python", "class Points"))
    for text, path in (("points.Points}", "data/points.yaml"), ("points.Network", "network/small.yaml")):
        Path("my", path).parent.mkdir(parents=True, exist_ok=True)
        Path("my", path).write_text(block("yaml", text))
    (export, setting), *lines = commands(block("sh", "PYTHONPATH"))
    assert (export, setting) == ("export", "PYTHONPATH=.")
    monkeypatch.syspath_prepend(".")
    short = {"train": ["trainer.steps=20", "trainer.batch_size=64"], "sample": ["sampler.steps=5"]}
    short["bpd"] = ["likelihood.solver.steps=16"]  # 20 steps of training leave a rough flow
    for _, verb, *arguments in lines:
        assert main([verb, *arguments, *short.pop(verb)]) == 0
    assert "test nats/dim" in capsys.readouterr().out
    assert list(Path("runs/points/figures").glob("samples_pc_*.png"))


@pytest.mark.slow
def test_models_trained_elsewhere(elsewhere):
    """The lines of Python, and the commands with fewer steps, on a checkpoint of score_sde."""
    source = Path(__file__).parent / "data" / "score_sde" / "ddpmpp_vp_continuous"
    for suffix in (".pth", ".config.json"):
        shutil.copy(source.with_suffix(suffix), f"checkpoint_8{suffix}")
    exec(compile(block("python", "convert.score_sde"), "docs/own_parts.md", "exec"), {})
    convert, sample, bpd = commands(block("sh", "convert source"))
    run(convert[1:])
    run(sample[1:])
    assert list(Path("runs/theirs/figures").glob("samples_published_vp_*.png"))
    assert bpd[:3] == ["scoresde", "bpd", "run=runs/theirs"]  # its CIFAR-10 is of 16 x 16 pixels, which there is not


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
    words = done.stdout.split()
    assert words[words.index("--nnodes") + 1] == "4"
    assert words[words.index("--rdzv-endpoint") + 1] == "first:29500"
    run(words[words.index("scoresde") + 1 :])
