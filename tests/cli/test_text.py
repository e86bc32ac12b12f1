"""Texts on the command line: a training on captions, samples of captions, and a run that is resumed or moved."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import scoresde as ss
from scoresde.cli import main
from scoresde.cli.common import fit_text
from scoresde.run_config import read_config
from tests.data.files import levels, png, write_parquet

WORDS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "dog", "owl")]
TRAIN = ["train", "experiment=images", "data=parquet", "data.root=.", "data.size=4", "data.captions=caption", "run=r"]
TRAIN += ["network=mlp", "network.shape=[3,4,4]", "network.width=8", "network.depth=1", "trainer.evaluate_every=0"]
TRAIN += ["trainer.preview_every=0", "trainer.batch_size=8", "condition.dropout=0.1", "trainer.warmup=1"]
SAMPLE = ["sample", "run=r", "sampler=ddim", "sampler.steps=2", "--json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with pictures and their captions, and a run of two steps on them."""
    folder = tmp_path_factory.mktemp("text")
    pictures = [png(levels(4, 4, seed=i)) for i in range(60)]
    for name in ("train-0", "test-0"):
        write_parquet(folder / f"{name}.parquet", pictures, caption=[WORDS[i % 6] for i in range(60)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*TRAIN, "text=tokens", "data.text.length=5", "trainer.steps=2"]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path, dirs_exist_ok=True)) / "r"


def test_a_training_stores_its_tokeniser_and_fits_the_network(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["text"] == config["data"]["test"]["text"]
    assert (config["data"]["text"]["size"], config["data"]["text"]["length"]) == (6, 5)  # with the unknown word
    assert config["network"]["text"] == {"_target_": "scoresde.networks.TextStyle", "vocabulary": 6, "length": 5}
    loaded = ss.load(run)
    assert loaded.model.network.conditions == ["text"]
    assert loaded.text(["red owl", ""])["text"].sum(dim=1).tolist()[1] == -5
    assert not loaded.model.conditional  # a tenth of the samples has no text


def test_samples_of_captions(run, capsys):
    assert main([*SAMPLE, "cond.text=red owl", "n=3"]) == 0
    one = json.loads(capsys.readouterr().out)
    text = ss.load(run).text
    cond = np.load(one["paths"]["conditions"])["text"]
    assert torch.equal(torch.from_numpy(cond), text(["red owl"] * 3)["text"])
    (run.parent / "captions.txt").write_text("red owl\n\nblue cat\n")
    assert main([*SAMPLE, "cond.text=@captions.txt", "n=3", "guidance=cfg"]) == 0
    two = json.loads(capsys.readouterr().out)
    assert two["rows"][0]["rows"] == ["red owl", "blue cat"]
    cond = np.load(two["paths"]["conditions"])["text"]
    assert torch.equal(torch.from_numpy(cond), text(["red owl"] * 3 + ["blue cat"] * 3)["text"])
    model = ss.load(run).model  # a row is drawn with the same seeds as one caption
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=2, denoise_final=False)
    again = sampler(model.given(text(["red owl"])), shape=(3, 3, 4, 4), seeds=range(3)).x
    samples = torch.from_numpy(np.load(one["paths"]["array"]))
    torch.testing.assert_close(samples, ss.load(run).transform.inverse(again), rtol=1e-4, atol=1e-2)


def test_unknown_words_are_warned_of(run, capsys):
    assert main([*SAMPLE, "cond.text=red owls", "n=1"]) == 0
    warning = "'red owls' has words that the training captions lack: 'owls' (near: owl)"
    assert capsys.readouterr().err.strip() == f"scoresde sample: warning: {warning}"


def test_a_run_can_be_moved_and_is_resumed_with_its_tokeniser(run):
    moved, before = run.rename(run.with_name("moved")), (run.parent / "moved" / "tokenizer.json").read_bytes()
    assert ss.load(moved).text.file == moved / "tokenizer.json"
    others = [part for part in TRAIN if part != "run=r"]
    assert main([*others, "text=tokens", "data.text.length=5", "trainer.steps=3", "run=moved"]) == 0
    assert (moved / "tokenizer.json").read_bytes() == before
    (moved / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no tokeniser at .*moved/tokenizer.json: restore the file"):
        ss.load(moved).text(["cat"])


def test_a_new_run_can_use_the_tokeniser_of_another(run):
    config = read_config(run)
    assert config.data.test.text.file == str(run / "tokenizer.json")
    fit_text(config, run.with_name("new"))
    assert config.data.text.file == str(run.with_name("new") / "tokenizer.json")
    assert run.with_name("new").joinpath("tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def test_data_without_captions_are_refused(run):
    config = read_config(run)
    config.data.text.file = config.data.train.captions = None
    with pytest.raises(ValueError, match=r"data\.text needs data with captions: take data=openmoji, or"):
        fit_text(config, run.with_name("new"))
