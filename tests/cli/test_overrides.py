"""Options, overrides, and one line that suggests what a wrong one was meant to be."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from scoresde.cli import add_condition, main, quote_path
from scoresde.cli.overrides import literal, parse_options

WRONG = {
    "key": (["train", "trainer.stps=5"], "scoresde train: no key 'trainer.stps'; did you mean trainer.steps?"),
    "key of a node": (["train", "lr=1"], "scoresde train: no key 'lr'; did you mean optimizer.lr?"),
    "key of two nodes": (["train", "steps=1"], "no key 'steps'; did you mean sampler.steps or trainer.steps?"),
    "node": (["train", "trianer.steps=1"], "no key 'trianer.steps'; did you mean trainer.steps?"),
    "group as a key": (["train", "experimnt=digits"], "no key 'experimnt'; did you mean experiment?"),
    "key after a choice": (["sample", "sampler=dpmpp2", "sampler.ordr=3"], "did you mean sampler.predictor.order?"),
    "argument that the configuration lacks": (
        ["train", "sampler=ode", "sampler.segments=2"],
        "no key 'sampler.segments' in the configuration: +sampler.segments=2 adds it",
    ),
    "nothing near": (["train", "qqqq=1"], "no key 'qqqq'; --help lists them all"),
    "key to delete": (["bpd", "~budgt"], "scoresde bpd: no key 'budgt'; did you mean budget?"),
    "option": (["sample", "sampler=dpmp2"], "no option 'dpmp2' in group sampler; did you mean dpmpp2? Available: ada"),
    "experiment": (["train", "experiment=digit"], "no option 'digit' in group experiment; did you mean digits? Avai"),
    "features": (
        ["evaluate", "features=inceptoin"],
        "did you mean inception? Available: contrastive, digits, inception, openmoji_",
    ),
    "option of a sweep": (["train", "sde=vp,subpv", "-m"], "no option 'subpv' in group sde; did you mean subvp?"),
    "far option": (["sample", "sampler=zzz"], "scoresde sample: no option 'zzz' in group sampler; available: adaptive"),
    "number": (["train", "sde=5"], "no option '5' in group sde; available: cosine, cosine_ddpm, ddpm"),
    "null": (["train", "sde=null"], "no option 'null' in group sde; available: cosine, cosine_ddpm, ddpm"),
    "group of others": (
        ["sample", "experiment=digits"],
        "sample has no group 'experiment'; the groups of sample: guidance, sampler",
    ),
    "group and option": (
        ["sample", "run", "digits"],
        "an override must be key=value; got 'run'; did you mean run=digits?",
    ),
    "group alone": (["train", "sde"], "an override must be key=value; got 'sde'; did you mean sde=...?"),
    "option alone": (
        ["train", "digits"],
        "an override must be key=value; got 'digits'; did you mean experiment=digits?",
    ),
    "word": (["train", "??"], "scoresde train: an override must be key=value; got '??'"),
    "group of Hydra": (["train", "hydra/lancher=joblib"], "no group 'hydra/lancher'; did you mean hydra/launcher?"),
    "type": (["train", "++hydra.job.num=many"], "many"),
    "syntax": (["train", "trainer.power=[0.05"], "'trainer.power=[0.05' cannot be read as key=value: quote a value"),
    "flag": (["train", "--multrun"], "scoresde train: no option --multrun; did you mean --multirun?"),
    "json flag": (["train", "--jsn"], "scoresde train: no option --jsn; did you mean --json?"),
    "choice of a flag": (["train", "--cfg", "jb"], "invalid choice: 'jb'"),
    "no value of a flag": (["train", "--cfg"], "argument --cfg/-c: expected one argument"),
    "no sweep": (
        ["train", "seed=0,1"],
        "seed=0,1 is a sweep over several values: add --multirun, or write a list: seed=[0,1]",
    ),
    "no sweep of a group": (
        ["train", "sde=vp,ve"],
        "scoresde train: sde=vp,ve is a sweep over several values: add --multirun",
    ),
    "no key": (["train", "=5"], "scoresde train: an override must be key=value; got '=5'"),
    "after right ones": (
        ["train", "-m", "+a=1", "+features=pixels", "hydra.job.name=x", "seed=0,1", "sde=ve,vp", "trainer.stps=5"],
        "scoresde train: no key 'trainer.stps'; did you mean trainer.steps?",
    ),
    "group left out": (["train", "~sde"], "the configuration has no sde: add it, or remove the override ~..."),
    "folder of configurations": (["train", "--config-dir", "mine"], "--config-dir must be a directory; got 'mine'"),
    "help": (
        ["train", "sde=vpp", "--help"],
        "no option 'vpp' in group sde; did you mean vp? Available: cosine, cosine_ddpm, ddpm",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_override_is_answered_with_what_was_meant(arguments, message, refused, tmp_path):
    assert message in refused(*arguments)
    assert "-m" in arguments or not list(tmp_path.iterdir())  # Hydra makes the folder of a sweep first


def test_a_configuration_of_ones_own_is_known(refused, tmp_path):
    (tmp_path / "my" / "data").mkdir(parents=True)
    (tmp_path / "my" / "data" / "measurements.yaml").write_text("shape: [2]\n")
    assert "did you mean measurements?" in refused("train", "--config-dir", "my", "data=measurement")


def test_the_cause_is_in_the_traceback(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"did you mean trainer\.steps") as caught:
        main(["train", "trainer.stps=5"])
    assert "Could not override 'trainer.stps'" in str(caught.value.__cause__)


def test_options_may_stand_among_overrides():
    options = parse_options(["a=1", "--multirun", "b=2", "~c", "--config-dir", ".", "+d=3", "--cfg", "job", "--json"])
    assert options.overrides == ["a=1", "b=2", "~c", "+d=3"]
    assert (options.multirun, options.config_dir, options.cfg, options.help) == (True, ".", "job", False)


TEXTS = ["", "it's", 'a"b', "1", "true", "null", "inf", "1e3", "a,b", "k=v", "a:b", "[x]", "{a}", "(b)", " a ", "~x"]
TEXTS += ["a\\", 'a\\"b', "é", "a\nb", "a\\\n", "choice(a,b)", "glob(*)", "#c", "a;b", "'\"", "x}", "runs/a=b,c=1"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_literal_is_read_as_its_text(text):
    parser = OverridesParser.create()
    assert parser.parse_override(f"key={literal(text)}").value() == text
    assert parser.parse_override(f"key=[{literal(text)}]").value() == [text]


def test_a_plain_text_is_its_own_literal():
    assert literal("runs/my-run_2.5") == "runs/my-run_2.5"


def test_a_condition_needs_no_plus():
    assert add_condition("sample", "cond.label=3") == "+cond.label=3"
    assert add_condition("restore", "cond.label=3") == "+cond.label=3"
    assert add_condition("sample", "cond.a.b=3") == "+cond.a.b=3"
    assert add_condition("sample", "cond.group=R&B") == '+cond.group="R&B"'
    for verb, override in (("sample", "cond=3"), ("sample", "+cond.label=3"), ("evaluate", "cond.label=3")):
        assert add_condition(verb, override) == override


def test_paths_are_quoted_if_hydra_would_read_them_otherwise(tmp_path, monkeypatch):
    """A file of a result has the overrides in its name; a comma alone is a sweep unless there is such a file."""
    monkeypatch.chdir(tmp_path)
    assert quote_path("measurement=x,n=2.npy") == 'measurement="x,n=2.npy"'
    assert quote_path("image=a,b.png") == "image=a,b.png"
    (tmp_path / "a,b.png").touch()
    assert quote_path("image=a,b.png") == 'image="a,b.png"'
    for override in ("measurement=null", "image=a.png", "n=a,n=2", 'samples="x,n=2.npy"', "run"):
        assert quote_path(override) == override
