"""Runs on the hub, against a stand-in of its interface: what is uploaded, what comes back, and what errors say."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import scoresde as ss
from scoresde import hub
from scoresde.cli import main
from scoresde.evaluation.trained_latents import TrainedLatents
from scoresde.networks import MLP
from scoresde.training import checkpoint
from tests import hub_server
from tests.cli.conftest import rows
from tests.conftest import normal

pytest.importorskip("huggingface_hub")


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = hub_server.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was trained for two steps."""
    path = tmp_path_factory.mktemp("runs") / "points"
    torch.manual_seed(0)
    model = ss.ScoreModel(MLP(2, width=8, depth=1), ss.VP(), "noise")
    data = np.random.RandomState(0).standard_normal((64, 2)).astype(np.float32)
    return ss.fit(model, data, run=path, steps=2, batch_size=32, progress=False)


def score(run):
    with torch.no_grad():
        return run.model.score(normal(3, 2).float(), 0.5)


def test_a_run_comes_back(server, trained):
    figures = trained.path / "figures"
    figures.mkdir(exist_ok=True)
    (figures / "samples_ddim.png").write_bytes(b"picture")
    tokenizer = trained.path / "tokenizer.json"
    tokenizer.write_bytes(b"{}")
    url = trained.push_to_hub("ada/points", licence="cc-by-4.0")
    assert url.startswith(f"{server.address}/ada/points/commit/")
    files = server.repositories["ada/points"][-1]
    assert set(files) == {"README.md", "config.yaml", "checkpoint.safetensors", "samples.png", "tokenizer.json"}
    run = ss.load("hf://ada/points")
    assert (run.path / "tokenizer.json").read_bytes() == b"{}"
    assert torch.equal(score(run), score(trained))
    assert run.config == trained.config
    assert str(run.transform) == str(trained.transform)
    _, info = checkpoint.load(run.path / "checkpoint.safetensors")
    assert info["step"] == 2
    with pytest.raises(ValueError, match="only averaged weights, not those of the last step"):
        ss.load("hf://ada/points", weights="raw")
    text = files["README.md"].decode()
    header, scope = yaml.safe_load(text.split("---")[1]), {}
    assert (header["library_name"], header["license"]) == ("scoresde", "cc-by-4.0")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    assert scope["data"].shape == (4, 2)
    tokenizer.unlink()
    server.repositories["ada/points"].append({**files, "notes.txt": b""})
    trained.push_to_hub("ada/points")
    assert set(server.repositories["ada/points"][-1]) == {*files, "notes.txt"} - {"tokenizer.json"}


def test_raw_weights_and_revisions(server, trained):
    raw = ss.load(trained.path, weights="raw")
    assert not torch.equal(score(raw), score(trained))
    trained.push_to_hub("ada/points", raw=True)
    for _ in range(2):
        raw.push_to_hub("ada/points")
    assert torch.equal(score(ss.load("hf://ada/points")), score(raw))
    assert torch.equal(score(ss.load("hf://ada/points", weights="raw")), score(raw))
    earlier = f"hf://ada/points@{hub_server.sha(1)}"
    assert torch.equal(score(ss.load(earlier)), score(trained))
    assert torch.equal(score(ss.load(earlier, weights="raw")), score(raw))
    with pytest.raises(FileNotFoundError, match=r"ada/points on .* has no revision 'v9'"):
        ss.load("hf://ada/points@v9")


def test_without_a_network_an_earlier_download_is_used(server, trained, monkeypatch):
    trained.push_to_hub("ada/points")
    ss.load("hf://ada/points")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert torch.equal(score(ss.load("hf://ada/points")), score(trained))
    with pytest.raises(ConnectionError, match=r"ada/other cannot be reached on http://127.0.0.1:9.*check the network"):
        ss.load("hf://ada/other")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        trained.push_to_hub("ada/points")


def test_the_command_line_takes_an_address(server, trained, capsys):
    trained.push_to_hub("ada/points")
    assert main(["sample", "run=hf://ada/points", "n=2", "sampler=ddim", "sampler.steps=2"]) == 0
    assert len(list(Path("runs/points/samples").iterdir())) == 1
    assert main(["train", "experiment=toy2d", "run=hf://ada/points"]) == 2
    assert "must be written to a local directory; got hf://ada/points: upload it later" in capsys.readouterr().err
    for write in (
        lambda: ss.convert.save_run(trained, "hf://a/b"),
        lambda: ss.fit(MLP(2), normal(9, 2), run="hf://a/b"),
    ):
        with pytest.raises(ValueError, match="must be written to a local directory; got hf://a/b"):
            write()
    assert not Path("hf:").exists()
    assert main(["sample", "run=hf://ada/none"]) == 2
    assert f"no repository ada/none on {server.address}, or it is private" in capsys.readouterr().err


def test_results_of_a_run_from_the_hub_are_in_a_directory_of_the_user(server, trained, capsys):
    """The data of the run are not uploaded: the likelihood is that of a new file."""
    trained.push_to_hub("ada/points")
    settings = ["likelihood=exact", "likelihood.solver.steps=4", "budget.samples=0", "budget.bound=null"]
    assert main(["bpd", "run=hf://ada/points", *settings]) == 2
    assert "runs/points has no test data: set data.test in its config.yaml, or give" in capsys.readouterr().err
    x = normal(30, 2).float()
    np.save("new.npy", x.numpy())
    assert main(["bpd", "run=hf://ada/points", "data.path=new.npy", *settings]) == 0
    (row,) = rows("runs/points", "likelihood")
    solver, transform = ss.solvers.Adams(steps=4), trained.transform
    nats = ss.log_prob(trained.model, transform(x), trace=ss.ExactTrace(), solver=solver).value + transform.log_det(x)
    assert (row["split"], row["mean"]) == ("new", pytest.approx(-float(nats.mean()) / 2, rel=1e-4))
    assert not list(Path("cache").rglob("metrics.jsonl"))
    ss.load(trained.path, weights="raw").push_to_hub("ada/points")
    assert main(["bpd", "run=hf://ada/points", "data.path=new.npy", *settings]) == 2
    assert "runs/points must hold the run hf://ada/points, or not exist; its checkpoint" in capsys.readouterr().err
    assert main(["report", f"run=hf://ada/points@{hub_server.sha(2)}", "film=false"]) == 0
    assert Path(f"runs/points@{hub_server.sha(2)}/report.html").is_file()


def test_a_run_of_latents_brings_its_autoencoder(server, tmp_path):
    torch.manual_seed(0)
    options = {"steps": 2, "batch_size": 8, "progress": False}
    network = ss.networks.ConvolutionalAutoencoder(4, 1, 2, width=4, multipliers=(1, 2), blocks=1)
    autoencoder, images = ss.pipelines.Autoencoder(network), normal(20, 1, 4, 4).float()
    ss.fit(autoencoder, images, "ae", **options, loss=ss.pipelines.AutoencoderObjective())
    unet = ss.networks.UNet(2, 2, width=8, multipliers=(1,), blocks=1)
    latents = TrainedLatents("ae", weights="raw")
    ss.fit(unet, images, "latent", **options, transform=latents).push_to_hub("ada/latent")
    for name in ("ae", "latent"):
        shutil.rmtree(name)
    run = ss.load("hf://ada/latent")
    assert run.transform.digest == latents.digest
    assert (run.state_shape, run.data_shape) == ((2, 2, 2), (1, 4, 4))
    assert main(["sample", "run=hf://ada/latent", "n=2", "sampler=ddim", "sampler.steps=2"]) == 0
    assert ss.load("runs/latent").transform.run == Path("runs/latent/autoencoder")


def test_says_what_is_missing(server, trained, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no repository ada/none on .* log in by `hf auth login`"):
        ss.load("hf://ada/none")
    server.repositories["ada/other"] = [{"README.md": b""}]
    with pytest.raises(
        FileNotFoundError, match=r"hf://ada/other must be a run of scoresde; got .* without config.yaml"
    ):
        ss.load("hf://ada/other")
    for address in ("hf://ada", "hf://ada/b/c", "hf://ada/points@"):
        with pytest.raises(ValueError, match="must be hf://user/name or hf://user/name@revision; got"):
            ss.load(address)
    with pytest.raises(ValueError, match="repo must be 'user/name'; got 'points'"):
        trained.push_to_hub("points")
    with pytest.raises(PermissionError, match=r"does not allow this for ada/points \(401\): log in"):
        trained.push_to_hub("ada/points", token="hf_wrong")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=r"(401|needs a token)"):
        trained.push_to_hub("ada/points")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'scoresde\[hub\]'"):
        hub.download("hf://ada/points", ["config.yaml"])


def test_a_configuration_from_the_hub_is_trusted_like_any_other(server, trained):
    trained.push_to_hub("ada/points")
    files = server.repositories["ada/points"][-1]
    text = files["config.yaml"].decode().replace("scoresde.networks.MLP", "os.system")
    assert "os.system" in text
    server.repositories["ada/points"].append({**files, "config.yaml": text.encode()})
    with pytest.raises(ValueError, match="os"):
        ss.load("hf://ada/points")
