"""config.yaml: the command it records, and its comparison with the configuration in a checkpoint."""

import pytest
from omegaconf import OmegaConf

from scoresde import run_config
from scoresde.run_config import changed_setting, flatten, plain, read_config


def written(tmp_path, command):
    """The run's directory with a configuration that records a command."""
    run_config.write_config(OmegaConf.create({"name": "x"}), tmp_path / "config.yaml", command)
    assert run_config.read_config(tmp_path) == {"name": "x"}
    return tmp_path


@pytest.mark.parametrize("words", [["experiment=digits", "run=runs/digits"], ["name='a b'", "x=#1", 'y="$z"', "é=ü"]])
def test_a_configuration_records_the_command_of_its_training(tmp_path, words):
    command = ["scoresde", "train", *words]
    assert run_config.read_command(written(tmp_path, command)) == command
    assert (tmp_path / "config.yaml").read_text().startswith("# scoresde train ")


@pytest.mark.parametrize("command", [None, ["scoresde", "train", "name=a\nname: y"], ["scoresde", "train", "a=\x85b"]])
def test_a_command_that_does_not_fit_into_a_comment_is_not_recorded(tmp_path, command):
    assert run_config.read_command(written(tmp_path, command)) is None


@pytest.mark.parametrize("line", ["name: x", "# a comment", "# scoresde train 'open"])
def test_another_first_line_is_not_a_command(tmp_path, line):
    (tmp_path / "config.yaml").write_text(f"{line}\nseed: 0\n")
    assert run_config.read_command(tmp_path) is None


def test_flatten_gives_leaves_by_their_path():
    tree = {"a": {"x": 1, "y": []}, "b": [{"c": None}, 2], "d": {}}
    assert flatten(tree) == {"a.x": 1, "a.y": [], "b.0.c": None, "b.1": 2, "d": {}}


BEFORE = {
    "network": {"width": 8},
    "optimizer": {"lr": 0.1},
    "trainer": {"steps": 3, "clip": 1.0},
    "data": {"shape": [2]},
}
CHANGES = {
    "network": ({"network": {"width": 16}}, "network.width was 8, now 16", True),
    "part of the network": ({"network": {"width": 8, "depth": 2}}, "network.depth was None, now 2", True),
    "shape": ({"data": {"shape": [2, 3]}}, "data.shape.1 was None, now 3", True),
    "optimiser": ({"optimizer": {"lr": 0.2}}, "optimizer.lr was 0.1, now 0.2", False),
    "setting of the trainer": ({"trainer": {"steps": 3, "clip": 2.0}}, "trainer.clip was 1.0, now 2.0", False),
    "removed": ({"optimizer": {}}, "optimizer.lr was 0.1, now None", False),
    "steps": ({"trainer": {"steps": 9, "clip": 1.0}}, None, False),
    "setting of a newer version": ({"trainer": {"steps": 3, "clip": 1.0, "new": 1}}, None, False),
    "device": ({"device": "cuda"}, None, False),
    "older name": ({"prediction": {"_target_": "scoresde.predictions.Karras"}}, "prediction._target_ was None", True),
}


@pytest.mark.parametrize(("change", "message", "is_of_model"), CHANGES.values(), ids=CHANGES)
def test_the_first_setting_that_changed_is_named(change, message, is_of_model):
    now = {**BEFORE, **change}
    for model_only in (False, True):
        found = changed_setting(BEFORE, now, model_only)
        if message is None or (model_only and not is_of_model):
            assert found is None
        else:
            assert found.startswith(message)


def test_a_name_of_an_older_version_is_no_change():
    old, new = ({"prediction": {"_target_": f"scoresde.predictions.{name}"}} for name in OLD_AND_NEW)
    assert changed_setting(old, new) is None


OLD_AND_NEW = ("Karras", "KarrasPreconditioning")


def doubled(first, line, count):
    """A configuration in which each value stands twice in the next: 2^count of them in all."""
    return first + "".join(line.format(i=i, j=i - 1) for i in range(1, count))


BOMBS = {
    "aliases": doubled("a0: &a0 [x,x]\n", "a{i}: &a{i} [*a{j},*a{j}]\n", 60),
    "merged": doubled("a0: &a0 {{b0: 1}}\n".format(), "a{i}: &a{i} {{x: *a{j}, y: *a{j}}}\n", 60),
    "text": doubled("a0: xxxxxxxxxx\n", "a{i}: ${{a{j}}}${{a{j}}}\n", 60),
    "nodes": doubled("a0: {x: 1}\n", "a{i}: {{x: '${{a{j}}}', y: '${{a{j}}}'}}\n", 60),
    "resolvers": doubled("a0: {x: 1}\n", "a{i}: {{x: '${{oc.select:a{j}}}', y: '${{oc.select:a{j},1}}'}}\n", 60),
    "itself": "a: &a [*a]\n",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_small_file_that_expands_without_bound_is_refused_at_once(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml must have at most 1,000,000 characters with its aliases"):
        read_config(tmp_path)


def test_aliases_and_interpolations_of_a_modest_size_are_read(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "a: &x {b: 1}\nc: {<<: *x, d: '${a.b}', e: ['${..d}', '${oc.select:a.b,2}']}\n"
    )
    assert plain(read_config(tmp_path)) == {"a": {"b": 1}, "c": {"b": 1, "d": 1, "e": [1, 1]}}
