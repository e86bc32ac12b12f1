"""The page: what is in it, what it says of what was not run, and that nothing of the run gets out of its place."""

import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch

from scoresde.evaluation.records import append_metrics
from scoresde.report import FilmSettings, render, write_report
from tests.report.runs import (
    add_log,
    configuration,
    likelihood_row,
    new_run,
    page_of,
    source_of,
    train_further,
    whole_run,
)

EVIL = "</style></details><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """What a page has: headings, tags that stay open, images, and its text."""

    def __init__(self, page):
        super().__init__()
        self.headings, self.open, self.images, self.tags, self.words = [], [], [], [], []
        self.feed(page)
        self.close()
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = whole_run(tmp_path_factory.mktemp("report") / "run")
    return path, page_of(path)


def test_a_whole_run_has_every_part(whole):
    path, page = whole
    reader = Reader(page)
    assert reader.open == []
    assert "missing" not in [attributes.get("class") for _, attributes in reader.tags]
    assert "1.750 ± 0.050" in reader.text
    assert "tiny: a generative model of grey images of 8" in reader.text
    assert "± 0.0400" in reader.text  # population
    assert "± 0.0300" in reader.text  # probes
    assert "\N{MINUS SIGN}0.00210 ± 0.00040" in reader.text  # finer solve
    assert "1.900 ± 0.060" in reader.text  # bound
    assert "log₂ 17 = 4.09 bits" in reader.text
    assert "3.25 ± 0.12" in reader.text  # Fréchet distance
    assert "noise floor (training data)" in reader.text
    assert "90% interval" in reader.text
    assert f"scoresde report run={path}" in reader.text


def test_the_outline_of_a_page(whole):
    reader = Reader(whole[1])
    assert reader.headings.count(1) == 1
    assert reader.headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(reader.headings))
    html = next(attributes for tag, attributes in reader.tags if tag == "html")
    assert html["lang"] == "en"
    links = [a["href"][1:] for tag, a in reader.tags if tag == "a"]
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    assert set(links) <= set(ids)
    assert {"about", "film", "commands"} <= set(links)


def test_a_page_stands_by_itself(whole):
    reader = Reader(whole[1])
    assert not [tag for tag, _ in reader.tags if tag in ("script", "iframe", "object", "embed")]
    addresses = [a[key] for _, a in reader.tags for key in ("src", "href", "xlink:href") if key in a]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search("https?:", re.sub(r"data:[^\"]*", "", whole[1]))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline';" in whole[1]
    assert "url(" not in whole[1]


def test_images_say_what_is_seen(whole):
    reader = Reader(whole[1])
    assert len(reader.images) == 2 + 2 * 3 + 2  # samples and data, frames, both ends of the likelihood
    assert all(len(image["alt"]) > 40 and re.search(r"\d", image["alt"]) for image in reader.images)
    svgs = [attributes for tag, attributes in reader.tags if tag == "svg"]
    assert all(a.get("role") == "img" or a.get("aria-hidden") == "true" for a in svgs)
    assert all(a.get("scope") in ("row", "col") for tag, a in reader.tags if tag == "th")
    assert page_count(reader, "table") == page_count(reader, "caption")


def page_count(reader, name):
    return sum(tag == name for tag, _ in reader.tags)


def test_the_most_and_least_likely_images_come_with_their_values(whole):
    text = Reader(whole[1]).text
    likely = np.linspace(1.0, 2.5, 297)
    assert " ".join(f"{value:.2f}" for value in likely[:8]) in text
    assert " ".join(f"{value:.2f}" for value in likely[::-1][:8]) in text


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,), (5,), (1,), (2, 16), (2, 2, 2, 3)])
def test_a_run_with_nothing_but_a_checkpoint_names_what_is_missing(tmp_path, shape):
    run = new_run(tmp_path / "run", shape)
    reader = Reader(page_of(run))
    assert reader.open == []
    for verb in ("sample", "bpd", "evaluate", "compare"):
        assert f"scoresde {verb} run={run}" in reader.text
    assert "From noise to data" in reader.text
    assert "no log of a training" in reader.text
    assert "scoresde train" not in reader.text
    trained = Reader(page_of(run, film=None, train=["scoresde", "train", "experiment=x"])).text
    assert f"scoresde train experiment=x run={run}" in trained


@pytest.mark.parametrize("shape", [(2,), (5,), (1,), (2, 16), (2, 2, 2, 3)])
def test_states_of_other_ranks_have_a_whole_page(tmp_path, shape):
    page = page_of(whole_run(tmp_path / "run", shape))
    reader = Reader(page)
    assert reader.open == []
    assert "nan" not in re.sub(r"data:[^\"]*", "", page).lower().replace("finance", "")
    assert "nats per dimension" in reader.text
    assert "Reverse SDE" in reader.text
    assert "No samples have been drawn" not in reader.text


def test_a_run_that_was_not_trained_here_has_no_command_for_it(tmp_path):
    run = new_run(tmp_path / "run", (2,), trainer=None, name=None)
    text = Reader(page_of(run, film=None)).text
    assert "run: a generative model of points of the plane" in text
    assert "scoresde train" not in text
    assert f"scoresde bpd run={run}" in text


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    text = Reader(page_of(new_run(tmp_path / "run", (2,), checkpoint=False))).text
    assert f"There is no film and there are no paths: no checkpoint at {tmp_path / 'run' / 'checkpoint'}" in text


def test_the_film_can_be_left_out(tmp_path):
    text = Reader(page_of(new_run(tmp_path / "run", (2,)), film=None)).text
    assert "The film was left out (film=false)." in text


def test_a_model_that_gives_no_samples_says_why(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    source = source_of(run)
    torch.nn.init.constant_(source.run.model.network.output.weight, math.nan)
    text = Reader(render(source)).text
    assert "There is no film and there are no paths: the model gave none: 4 of 4 samples are NaN" in text
    with pytest.raises(ValueError, match="samples=1, steps=6, frames=3"):
        page_of(run, film=FilmSettings(1, 6, 3))


def test_a_model_that_fails_in_its_own_way_says_how(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run", (2,))
    source = source_of(run)

    def wants_a_condition(*_):
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    monkeypatch.setattr(source.run.model.network, "forward", wants_a_condition)
    assert "the model gave none: AttributeError: 'NoneType' object has no" in Reader(render(source)).text
    with pytest.raises(ValueError, match="got samples=0, steps=6"):
        page_of(run, film=FilmSettings(0, 6, 3))


def test_series_of_one_value_have_a_page(tmp_path):
    assert "From noise to data" in Reader(page_of(whole_run(tmp_path / "run", (2, 1)))).text


def test_held_out_data_that_was_trained_on_is_not_asked_for(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    given = {"film": None, "train": ["scoresde", "train"]}
    assert "trainer.evaluate_every=100" in Reader(page_of(run, **given)).text
    config = configuration((2,), trainer={"_target_": "scoresde.training.Trainer", "evaluate_every": 0})
    text = Reader(page_of(run, config=config, **given)).text
    assert "Held-out data were not measured (trainer.evaluate_every=0)." in text
    assert "trainer.evaluate_every=100" not in text


def test_tables_of_several_feature_spaces_are_told_apart(tmp_path, whole):
    run = new_run(tmp_path / "run", (1, 8, 8))
    for space in ("inception", "pixels"):
        row = {"kind": "quality", "of": "samples", "metric": "kid", "value": 1.0, "features": space}
        append_metrics(run, {**row, "reference": "train data"})
    reader = Reader(page_of(run, film=None))
    labels = [attributes.get("aria-label") for _, attributes in reader.tags]
    assert {f"Quality of samples by the features “{space}”" for space in ("inception", "pixels")} <= set(labels)
    assert "held back" not in reader.text


def test_an_earlier_training_picture_stands_in_for_samples(tmp_path, whole):
    run = new_run(tmp_path / "run", (1, 8, 8))
    (run / "figures").mkdir()
    (run / "figures" / "step000040.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    text = Reader(page_of(run, film=None)).text
    assert "Drawn by the training, step 40" in text
    assert f"scoresde sample run={run}" in text


def test_figures_of_an_earlier_checkpoint_are_marked(tmp_path):
    run = whole_run(tmp_path / "run")
    assert "of an earlier checkpoint" not in Reader(page_of(run, film=None)).text
    train_further(run)
    text = Reader(page_of(run, film=None)).text
    assert text.count("These figures are of an earlier checkpoint of the run.") == 4
    assert "bits per dimension, test data (of an earlier checkpoint)" in text
    for verb in ("sample", "bpd", "compare", "evaluate"):
        assert text.count(f"scoresde {verb} run={run}") == 1


def test_values_that_were_not_kept_are_missed(tmp_path):
    run = new_run(tmp_path / "run", (1, 8, 8))
    append_metrics(run, likelihood_row())
    assert "The values of the samples were not kept" in Reader(page_of(run, film=None)).text


def test_data_that_is_not_to_be_had_is_said(tmp_path):
    run = whole_run(tmp_path / "run")
    text = Reader(page_of(run, film=None, data={"test": "the disk is elsewhere"})).text
    assert "The most and least likely images are not shown: the disk is elsewhere." in text


def test_steps_that_were_left_out_are_told(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    add_log(run)
    (run / "skipped.jsonl").write_text('{"step": 3, "in_a_row": 1, "reason": "the loss is not finite at step 3"}\n')
    text = Reader(page_of(run, film=None)).text
    assert "1 step was left out" in text
    assert "the loss is not finite at step 3" in text


def test_what_comes_from_the_run_is_escaped(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    config = {**configuration((2,), name=EVIL, sde={"_target_": EVIL}), "loss": EVIL}
    conventions = {"quantity": EVIL, EVIL: EVIL, "solver": EVIL, "trace": EVIL}
    for _ in range(2):
        append_metrics(run, likelihood_row(conventions=conventions, unit=EVIL, bound_conventions={EVIL: EVIL}))
    append_metrics(run, {"kind": "quality", "of": EVIL, "metric": EVIL, "value": 1.0, "error": None, "features": EVIL})
    (run / "samples").mkdir()
    page = page_of(run, config=config, run=EVIL, config_text=EVIL, train=[EVIL], data={"test": EVIL})
    assert "<script>" not in page
    assert "<img src=x" not in page
    reader = Reader(page)
    assert reader.open == []
    assert EVIL in " ".join(reader.words)


def test_a_report_is_written_in_one_move(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    before = {path.name for path in run.iterdir()}
    assert write_report(source_of(run, film=None)) == run / "report.html"
    assert {path.name for path in run.iterdir()} - before == {"report.html"}
    assert write_report(source_of(run, film=None), tmp_path / "elsewhere" / "x.html").is_file()
