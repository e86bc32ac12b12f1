"""The page: its content, what it says about missing parts, and that text from a run cannot leave its place."""

import math
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from scoresde.evaluation.records import append_metrics
from scoresde.report import FilmSettings, render, write_report
from tests.report import runs

EVIL = "</style></details><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """The headings, tags (name, attributes) and text of a page, and the tags that stay open."""

    def __init__(self, page):
        super().__init__()
        self.headings, self.open, self.tags, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.texts).split())

    def all(self, name):
        """The attributes of each tag of that name."""
        return [attributes for tag, attributes in self.tags if tag == name]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.append(" " if tag in ("td", "th") else "")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)


def read(run, film=None, **changes):
    """The page of a run's directory, without a film by default."""
    return Reader(runs.page_of(run, film=film, **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = runs.whole_run(tmp_path_factory.mktemp("report") / "run")
    return path, runs.page_of(path)


def test_a_whole_run_has_every_part(whole):
    path, page = whole
    reader = Reader(page)
    assert "missing" not in [attributes.get("class") for _, attributes in reader.tags]
    likely = np.linspace(1.0, 2.5, 297)
    for text in (
        "1.750 ± 0.050",
        "tiny: a generative model of grey images of 8",
        "dataset Digits, with noise",
        "variance preserving",
        "one pixel value of images that the model was not trained on",
        "log₂ 17 = 4.09 bits",
        "± 0.0400",  # population
        "± 0.0300",  # probes
        "\N{MINUS SIGN}0.00210 ± 0.00040",  # finer solve
        "1.900 ± 0.060",  # bound
        " ".join(f"{value:.2f}" for value in likely[:8]),
        " ".join(f"{value:.2f}" for value in likely[::-1][:8]),
        "106 samples a second (median); at most 0.25 GB",
        "noise floor (training data)",
        "unipc2 10 1 0.070 ± 0.010",  # half of 0.9 to 1.2 times the value
        "90% interval",
        "squared Fréchet distance 3.25 ± 0.12 1.50 ± 0.12",
        "images : reference 297 : 297 297 : 297",
        f"scoresde report run={path}",
    ):
        assert text in reader.text


def test_the_outline_of_a_page(whole):
    reader = Reader(whole[1])
    assert reader.headings[0] == reader.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(reader.headings))
    assert reader.all("html")[0]["lang"] == "en"
    links = {a["href"][1:] for a in reader.all("a")}
    identifiers = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    assert {"about", "film", "restorations", "commands"} <= links <= set(identifiers)
    sections = [a["aria-labelledby"] for a in reader.all("section")]
    assert (sections[0], sections[-1]) == ("samples", "glossary")
    assert [a["href"][1:] for a in reader.all("a") if a["href"][1:] in sections] == [s for s in sections if s in links]


def test_a_page_is_self_contained(whole):
    reader = Reader(whole[1])
    assert not [tag for tag, _ in reader.tags if tag in ("script", "iframe", "object", "embed")]
    assert len(reader.all("style")) == 1
    addresses = [a[key] for _, a in reader.tags for key in ("src", "href", "xlink:href") if key in a]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"https?:|url\((?!#)", re.sub(r"data:[^\"]*", "", whole[1]))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline';" in whole[1]


def test_images_and_tables_are_described(whole):
    reader = Reader(whole[1])
    images = reader.all("img")
    assert len(images) == 2 + 2 * 3 + 2 + 1  # samples and data, frames, both ends of the likelihood, a restoration
    assert all(len(image["alt"]) > 40 and re.search(r"\d", image["alt"]) for image in images)
    assert all(a.get("role") == "img" or a.get("aria-hidden") == "true" for a in reader.all("svg"))
    assert all(a.get("scope") in ("row", "col") for a in reader.all("th"))
    assert len(reader.all("table")) == len(reader.all("caption"))


@pytest.mark.parametrize("shape", [(1, 8, 8), (5,)])
def test_a_run_with_only_a_checkpoint_names_the_missing_parts(tmp_path, shape):
    run = runs.new_run(tmp_path / "run", shape)
    text = Reader(runs.page_of(run)).text
    for verb in ("sample", "bpd", "evaluate", "compare"):
        assert f"scoresde {verb} run={run}" in text
    assert "no log of its training" in text
    assert "scoresde train" not in text
    assert f"scoresde train experiment=x run={run}" in read(run, train=["scoresde", "train", "experiment=x"]).text


@pytest.mark.parametrize("shape", [(2,), (1,), (2, 16), (2, 2, 2, 3)])
def test_states_of_other_ranks_have_a_page(tmp_path, shape):
    run = runs.new_run(tmp_path / "run", shape)
    runs.add_samples(run, shape)
    runs.add_likelihood(run, n=4, unit="nats/dim")
    page = runs.page_of(run)
    text = Reader(page).text
    assert "nan" not in re.sub(r"data:[^\"]*", "", page).lower()
    assert f"divided by their {math.prod(shape)} dimension" in text
    assert "Reverse SDE" in text
    assert "No samples have been drawn" not in text


def test_a_run_without_name_and_training_has_a_page(tmp_path):
    config = runs.configuration((2,), trainer=None, name=None, sde={"_target_": "mine.Path"})
    text = read(runs.new_run(tmp_path / "run", (2,), checkpoint=False), config=config).text
    assert "run: a generative model of points in the plane" in text
    assert "from the dataset Toy2D (moons)" in text
    assert "the noise follows Path" in text


@pytest.mark.parametrize(("split", "text"), [("train", "that the model was trained on"), ("x", "of the x data")])
def test_the_split_of_the_likelihood_is_named(tmp_path, split, text):
    run = runs.new_run(tmp_path / "run", (1, 8, 8), checkpoint=False)
    row = {"kind": "likelihood", "n": 9, "mean": 1.0, "split": split, "unit": "bits/dim"}  # of an older version
    append_metrics(run, row)
    assert f"one pixel value of images {text}, with" in read(run).text


def test_a_missing_film_has_a_reason(tmp_path):
    run = runs.new_run(tmp_path / "run", (2,), checkpoint=False)
    assert "The film was left out (film=false)." in read(run).text
    reason = f"There is no film and there are no paths: no checkpoint at {run / 'checkpoint'}"
    assert reason in Reader(runs.page_of(run)).text


def test_a_model_that_fails_has_a_reason(tmp_path, monkeypatch):
    run = runs.new_run(tmp_path / "run", (2,))
    source = runs.source_of(run)
    torch.nn.init.constant_(source.run.model.network.output.weight, math.nan)
    assert "no paths: the model failed: 4 of 4 samples are NaN" in Reader(render(source)).text

    def needs_a_condition(*_):
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    monkeypatch.setattr(source.run.model.network, "forward", needs_a_condition)
    assert "the model failed: AttributeError: 'NoneType' object has no" in Reader(render(source)).text
    with pytest.raises(ValueError, match="samples=1, steps=6, frames=3"):
        runs.page_of(run, film=FilmSettings(1, 6, 3))


def test_held_out_data_that_was_trained_on_is_not_asked_for(tmp_path):
    run = runs.new_run(tmp_path / "run", (2,), checkpoint=False)
    (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert "trainer.evaluate_every=100" in read(run, train=["scoresde", "train"]).text
    config = runs.configuration((2,), trainer={"_target_": "scoresde.training.Trainer", "evaluate_every": 0})
    text = read(run, config=config, train=["scoresde", "train"]).text
    assert "The loss on held-out data was not measured (trainer.evaluate_every=0)." in text
    assert "trainer.evaluate_every=100" not in text


def test_each_feature_space_has_a_table_with_the_latest_figures(tmp_path):
    run = runs.new_run(tmp_path / "run", (1, 8, 8), checkpoint=False)
    for space, value in (("inception", 1.0), ("pixels", 2.0), ("pixels", 3.0)):
        row = {"kind": "quality", "of": "samples", "metric": "kid", "value": value, "features": space}
        append_metrics(run, {**row, "reference": "train data"})
    reader = read(run)
    labels = [attributes.get("aria-label") for attributes in reader.all("div")]
    assert {f"Quality of samples by the features “{space}”" for space in ("inception", "pixels")} <= set(labels)
    assert re.findall(r"KID (\d\.\d+)", reader.text) == ["1.0000", "3.0000"]


def test_a_picture_of_the_training_replaces_missing_samples(tmp_path):
    run = runs.new_run(tmp_path / "run", (1, 8, 8), checkpoint=False)
    (run / "figures").mkdir()
    for step in (20, 40):
        (run / "figures" / f"step{step:06d}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    text = read(run).text
    assert "Drawn during training, step 40" in text
    assert f"scoresde sample run={run}" in text


def test_figures_of_an_earlier_checkpoint_are_marked(tmp_path, whole):
    assert "of an earlier checkpoint" not in whole[1]
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (run / "log.jsonl").unlink()
    runs.train_further(run)
    text = read(run).text
    assert text.count("These results are of an earlier checkpoint of the run.") == 5
    assert "bits per dimension, test data (of an earlier checkpoint)" in text
    for verb in ("sample", "bpd", "compare", "evaluate", "restore"):
        assert text.count(f"scoresde {verb} run={run}") == 1


def test_missing_values_and_data_have_a_reason(tmp_path):
    run = runs.new_run(tmp_path / "run", (1, 8, 8), checkpoint=False)
    runs.add_likelihood(run)
    text = read(run, data=lambda split: f"the disk with the {split} data is elsewhere").text
    assert "The most and least likely images are not shown: the disk with the test data is elsewhere." in text
    (run / "per_sample" / "test.npz").unlink()
    assert "The values of the samples are not available" in read(run).text


def test_samples_name_their_guidance_and_condition(tmp_path, whole):
    assert "guidance" not in Reader(whole[1]).text
    run = runs.new_run(tmp_path / "run", (1, 8, 8))
    guidance = {"_target_": "scoresde.guidance.ClassifierFree", "scale": 1.5, "interval": None}
    runs.add_samples(run, (1, 8, 8), guidance=guidance, cond={"label": "all"})
    assert "with the guidance ClassifierFree(scale=1.5), for the condition label=all; 20 samples took" in read(run).text


def test_the_makers_of_the_data_are_credited(tmp_path):
    config = runs.configuration((2,))
    config["data"] = {**config["data"], "credit": "pictures by <b>, licence CC BY-SA 4.0"}
    run = runs.new_run(tmp_path / "run", (2,), checkpoint=False)
    assert "Credit for the data: pictures by <b>, licence CC BY-SA 4.0." in read(run, config=config).text


def test_skipped_steps_are_counted(tmp_path):
    run = runs.new_run(tmp_path / "run", (2,), checkpoint=False)
    (run / "skipped.jsonl").write_text('{"step": 3, "in_a_row": 1, "reason": "the loss is not finite at step 3"}\n')
    text = read(run).text
    assert "1 step was skipped" in text
    assert "the loss is not finite at step 3" in text


def test_text_from_the_run_is_escaped(tmp_path):
    run = runs.new_run(tmp_path / "run", (2,), checkpoint=False)
    config = {**runs.configuration((2,), name=EVIL, sde={"_target_": EVIL}), "loss": EVIL}
    conventions = {"quantity": EVIL, EVIL: EVIL, "solver": EVIL, "trace": EVIL}
    for _ in range(2):
        append_metrics(run, runs.likelihood_row(conventions=conventions, unit=EVIL, bound_conventions={EVIL: EVIL}))
    append_metrics(run, {"kind": "quality", "of": EVIL, "metric": EVIL, "value": 1.0, "error": None, "features": EVIL})
    changes = {"run": EVIL, "config_text": EVIL, "train": [EVIL], "data": lambda split: EVIL, "overrides": [EVIL]}
    page = runs.page_of(run, config=config, **changes)
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert EVIL in " ".join(Reader(page).texts)


def test_a_report_is_written_in_one_move(tmp_path):
    run = runs.new_run(tmp_path / "run", (2,), checkpoint=False)
    before = {path.name for path in run.iterdir()}
    assert write_report(runs.source_of(run, film=None)) == run / "report.html"
    assert {path.name for path in run.iterdir()} - before == {"report.html"}
    assert write_report(runs.source_of(run, film=None), tmp_path / "elsewhere" / "x.html").is_file()
