"""A key that neither the verb, nor a constructor, nor an interpolation reads is refused."""

import pytest
import yaml
from omegaconf import OmegaConf

from scoresde.cli import main
from scoresde.cli.common import config_directory
from scoresde.cli.keys import check_keys, key_paths, nearest_keys, unknown
from scoresde.cli.overrides import configurations
from scoresde.run_config import flatten

UNREAD = {
    "condition of another verb": (["evaluate", "run=x", "+cond.label=3"], "scoresde evaluate: no key 'cond'; "),
    "condition": (["bpd", "run=x", "+cond=3"], "scoresde bpd: no key 'cond'; "),
    "data of a run": (["evaluate", "run=x", "+data.path=new.npy"], "scoresde evaluate: no key 'data'; "),
    "node": (["train", "+trainr.steps=7"], "scoresde train: no key 'trainr'; did you mean trainer?"),
    "argument": (["train", "+trainer.stps=7"], "no key 'trainer.stps'; did you mean trainer.steps?"),
    "argument of a part": (["sample", "run=x", "+sampler.corrector.srn=1"], "did you mean sampler.corrector.snr?"),
    "option of a verb": (["report", "run=x", "+film_step=3"], "did you mean film_steps?"),
    "part of the data": (["train", "+data.validaton.n=3"], "no key 'data.validaton'; did you mean data.validation?"),
    "part of the training": (["train", "+data.training.transfrm=1"], "did you mean data.transform?"),
    "likelihood": (["bpd", "run=x", "+likelihood.sample=3"], "did you mean likelihood.samples?"),
    "held-out data": (["train", "+held_out.drws=3"], "no key 'held_out.drws'; did you mean held_out.draws?"),
    "data alone": (["data", "experiment=toy2d", "+trainer.clp=3"], "no key 'trainer.clp'; did you mean trainer.clip?"),
    "forced": (["train", "++sde.bta_max=3", "sde=vp"], "no key 'sde.bta_max'; did you mean sde.beta_max?"),
    "in a sweep": (["train", "-m", "+sed=1,2"], "scoresde train: no key 'sed'; did you mean seed or trainer.seed?"),
}


@pytest.mark.parametrize(("arguments", "message"), UNREAD.values(), ids=UNREAD)
def test_a_key_that_nothing_reads_is_refused_before_anything_is_done(arguments, message, capsys, tmp_path):
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(message in error for error in errors)
    assert len(errors) == (2 if "-m" in arguments else 1)
    assert "-m" in arguments or not list(tmp_path.iterdir())


def test_a_misspelt_key_of_an_own_experiment_is_refused(refused, tmp_path):
    (tmp_path / "my" / "experiment").mkdir(parents=True)
    mine = "# @package _global_\nname: mine\ntrainr:\n  steps: 1\n"
    (tmp_path / "my" / "experiment" / "mine.yaml").write_text(mine)
    assert "no key 'trainr'; did you mean trainer?" in refused("train", "--config-dir", "my", "experiment=mine")


def check(config):
    check_keys("train", config, config.hydra.runtime.choices)


def test_every_key_of_every_experiment_is_read_and_set():
    """Also a key that train.yaml sets itself, such as condition.dropout, has the value of the experiment."""
    with configurations("train", None) as (compose, _):
        for path in sorted((config_directory() / "experiment").glob("*.yaml")):
            config, own = compose(f"experiment={path.stem}"), yaml.safe_load(path.read_text())
            check(config)
            del own["defaults"]
            assert flatten(own).items() <= flatten(OmegaConf.to_container(config, resolve=False)).items()


def test_an_interpolated_key_and_what_an_optional_argument_adds_are_read():
    with configurations("train", None) as (compose, _):
        check(compose("network=mlp", "+my={w: 32}", "network.width=${my.w}"))
        check(compose("+optimizer.amsgrad=true", "trainer.wandb={project: any}"))


def test_a_key_that_is_interpolated_from_beside_it_is_read():
    with configurations("train", None) as (compose, _):
        config = compose("+data.half=4", "data.range=[0,'${..half}']")
        check(config)
        config.data.range = [0, 4]
        with pytest.raises(ValueError, match=r"no key 'data\.half'"):
            check(config)


def test_a_variable_of_the_data_may_be_overridden_where_it_is_used():
    with configurations("train", None) as (compose, _):
        check(compose("data=table", *(f"data.{split}.labels=kind" for split in ("train", "validation", "test"))))


def test_the_path_of_a_file_is_known_where_a_dataset_has_one():
    with configurations("train", None) as (compose, _):
        config = compose("data=arrays", "+data.pth=x.npy")
        with pytest.raises(ValueError, match=r"no key 'data\.pth'; did you mean data\.path\?"):
            check(config)


def test_keys_are_near_by_their_whole_or_by_their_last_name():
    config = {"a": {"steps": 1, "rate": 2}, "b": {"steps": 3, "list": [{"x": 1}]}, "seed": 0, "hydra": {"y": 1}}
    known = key_paths(OmegaConf.create(config))
    assert known == ["a", "a.rate", "a.steps", "b", "b.list", "b.list.0", "b.list.0.x", "b.steps", "seed"]
    assert nearest_keys("a.stesp", known) == ["a.steps"]
    assert nearest_keys("steps", known) == ["a.steps", "b.steps"]
    assert nearest_keys("rat", known) == ["a.rate"]
    assert nearest_keys("zzz", known) == []
    assert unknown("zzz", known) == "no key 'zzz'; --help lists them all"
