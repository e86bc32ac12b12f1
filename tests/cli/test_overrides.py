"""Wrong options and overrides: one line, exit code 2, and what was probably meant."""

from pathlib import Path

import pytest

from scoresde.cli import main
from scoresde.cli.overrides import near_keys, paths
from tests.cli.conftest import refused

WRONG = {
    "key": (["train", "trainer.stps=5"], "scoresde train: no key 'trainer.stps'; did you mean trainer.steps?"),
    "key of a node": (["train", "lr=1"], "scoresde train: no key 'lr'; did you mean optimizer.lr?"),
    "key of two nodes": (["train", "steps=1"], "no key 'steps'; did you mean sampler.steps or trainer.steps?"),
    "node": (["train", "trianer.steps=1"], "no key 'trianer.steps'; did you mean trainer.steps?"),
    "group as a key": (["train", "experimnt=digits"], "no key 'experimnt'; did you mean experiment?"),
    "key after a choice": (["sample", "sampler=dpmpp2", "sampler.ordr=3"], "did you mean sampler.predictor.order?"),
    "nothing near": (["train", "qqqq=1"], "no key 'qqqq'; `scoresde train --help` lists them. (+qqqq=1 adds it)"),
    "key to delete": (["bpd", "~budgt"], "scoresde bpd: no key 'budgt'; did you mean budget?"),
    "option": (["sample", "sampler=dpmp2"], "no option 'dpmp2' in group sampler; did you mean dpmpp2? There are: ada"),
    "experiment": (["train", "experiment=digit"], "no option 'digit' in group experiment; did you mean digits? There"),
    "sde": (["train", "sde=vpp"], "no option 'vpp' in group sde; did you mean vp? There are: cosine, ddpm, karras, "),
    "features": (["evaluate", "features=inceptoin"], "did you mean inception? There are: digits, inception, pixels"),
    "option of a sweep": (["train", "sde=vp,subpv", "-m"], "no option 'subpv' in group sde; did you mean subvp?"),
    "far option": (["sample", "sampler=zzz"], "scoresde sample: no option 'zzz' in group sampler; there are: adaptive"),
    "group of others": (["sample", "experiment=digits"], "no group experiment in this verb; its groups: sampler"),
    "group and option": (["sample", "run", "digits"], "key=value expected; got 'run'; did you mean run=digits?"),
    "group alone": (["train", "sde"], "key=value expected; got 'sde'; did you mean sde=...?"),
    "option alone": (["train", "digits"], "key=value expected; got 'digits'; did you mean experiment=digits?"),
    "word": (["train", "??"], "scoresde train: key=value expected; got '??'"),
    "group of Hydra": (["train", "hydra/lancher=joblib"], "no group 'hydra/lancher'; did you mean hydra/launcher?"),
    "type": (["train", "++hydra.job.num=many"], "many"),
    "syntax": (["train", "trainer.power=[0.05"], "'trainer.power=[0.05' cannot be read as key=value; quote a value"),
    "flag": (["train", "--multrun"], "scoresde train: no option --multrun; did you mean --multirun?"),
    "json flag": (["train", "--jsn"], "scoresde train: no option --jsn; did you mean --json?"),
    "choice of a flag": (["train", "--cfg", "jb"], "invalid choice: 'jb'"),
    "no sweep": (["train", "seed=0,1"], "seed=0,1 is a sweep: add --multirun; as a list it is seed=[0,1]"),
    "no sweep of a group": (["train", "sde=vp,ve"], "scoresde train: sde=vp,ve is a sweep: add --multirun"),
    "no key": (["train", "=5"], "scoresde train: key=value expected; got '=5'"),
    "no option": (["train", "sde=null"], "an option of group sde expected, sde=...; got null; there are: cosine, ddpm"),
    "group left out": (["train", "~sde"], "a configuration with sde expected; it has none (does an override, ~..."),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_override_is_answered_with_what_was_meant(arguments, message, capsys):
    assert message in refused(capsys, *arguments)
    assert "-m" in arguments or not list(Path().iterdir())  # Hydra has its folder of a sweep before it looks


def test_a_configuration_of_ones_own_is_known(capsys, tmp_path):
    (tmp_path / "my" / "data").mkdir(parents=True)
    (tmp_path / "my" / "data" / "measurements.yaml").write_text("shape: [2]\n")
    found = refused(capsys, "train", "--config-dir", "my", "data=measurement")
    assert "did you mean measurements?" in found
    assert main(["train", "--config-dir", "mine"]) == 2
    assert "not found" in capsys.readouterr().err


def test_the_cause_is_in_the_traceback(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"did you mean trainer\.steps") as caught:
        main(["train", "trainer.stps=5"])
    assert "Could not override 'trainer.stps'" in str(caught.value.__cause__)


def test_keys_are_near_by_their_whole_or_by_their_last_name():
    known = list(paths({"a": {"steps": 1, "rate": 2}, "b": {"steps": 3, "list": [{"x": 1}]}, "seed": 0}))
    assert known == ["a", "a.steps", "a.rate", "b", "b.steps", "b.list", "b.list.0", "b.list.0.x", "seed"]
    assert near_keys("a.stesp", known) == ["a.steps"]
    assert near_keys("steps", known) == ["a.steps", "b.steps"]
    assert near_keys("rat", known) == ["a.rate"]
    assert near_keys("zzz", known) == []
