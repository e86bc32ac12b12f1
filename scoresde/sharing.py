"""Upload a run to the Hugging Face hub: its weights, configuration, model card, and a picture of samples.

| file                         | content                                            |
| ---------------------------- | -------------------------------------------------- |
| `README.md`                  | the model card, see `model_card`                   |
| `checkpoint.safetensors`     | the weights                                        |
| `config.yaml`                | the configuration                                  |
| `samples.png`                | the latest picture of samples, if there is one     |
| `dequantization.safetensors` | the learned dequantisation, if there is one        |
| `tokenizer.json`             | the tokeniser, if the conditions are texts         |
| `autoencoder/`               | the weights and configuration of the autoencoder,  |
|                              | if the model is one of latents                     |
"""

import filecmp
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from scoresde import hub, model_card
from scoresde.atomic_files import replace_atomically
from scoresde.run_config import AUTOENCODER, CONFIG, LATENTS, nested, plain, read_config, write_config
from scoresde.text import TOKENIZER
from scoresde.training import checkpoint
from scoresde.training.learned_dequantization import DEQUANTIZATION
from scoresde.training.trainer import CHECKPOINT

BESIDE = (DEQUANTIZATION, TOKENIZER)  # files in the directory of some runs, copied as they are
OPTIONAL = (*BESIDE, f"{AUTOENCODER}/{CHECKPOINT}", f"{AUTOENCODER}/{CONFIG}")  # files that only some runs have
FILES = (CONFIG, CHECKPOINT, *OPTIONAL)  # that `load` downloads
RUNS = Path("runs")  # directory of the runs that commands download, in the working directory


def local_copy(address: str | Path) -> Path:
    """Copy a run from the hub to `runs/NAME` in the working directory, and return this directory.

    Commands read the run there and write their results beside it. NAME is that of the repository, `NAME@revision` if
    the address has a revision. Files that the directory already has are kept.

    Raises:
        ValueError: the directory holds another run, or an earlier version of this one.
        ImportError, FileNotFoundError, PermissionError, ConnectionError: see `hub.download`.
    """
    source = hub.download(address, FILES)
    path = RUNS / str(address).partition(":")[2].strip("/").partition("/")[2].replace("/", "-")
    for name in (CHECKPOINT, CONFIG):
        if (path / name).is_file() and not filecmp.cmp(source / name, path / name):
            raise ValueError(
                f"{path} must hold the run {address}, or not exist; its {name} is another one: use it as run={path}, "
                "or move it to another place and repeat the command"
            )
    for name in reversed(FILES):  # the configuration last, so that a directory with a configuration is complete
        if (source / name).is_file() and not (path / name).exists():
            replace_atomically(path / name, partial(shutil.copy2, source / name))
    return path


def push_to_hub(
    run: Any,
    repo: str,
    private: bool = False,
    raw: bool = False,
    licence: str | None = None,
    message: str = "Upload a run",
    token: str | None = None,
) -> str:
    """Upload a run to the Hugging Face hub, and return the address of the commit; `load("hf://user/name")` reads it.

    The repository gets the weights that the run was loaded with, by default the averaged ones; the configuration, which
    may name files of this machine; a model card with the stored likelihood and its errors; the latest picture of
    samples; a learned dequantisation; a tokeniser; and the autoencoder of a model of latents. Of these, the files of an
    earlier upload that the run lacks are deleted.

    Args:
        run: the run (`run.push_to_hub(repo)`).
        repo: "user/name"; it is made if it does not exist.
        private: whether a new repository can be read by its owner only.
        raw: if True, upload the weights of the last step too, for `load(..., weights="raw")`.
        licence: identifier of the licence of the weights, such as "cc-by-4.0".
        message: the message of the commit.
        token: a token of the hub; default: HF_TOKEN or that of `hf auth login`.

    Raises:
        ImportError, ValueError, PermissionError, ConnectionError: see `hub.upload`.
        FileNotFoundError: `raw` is True and the run has no checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_shared(run, Path(folder), repo, raw, licence)
        return hub.upload(Path(folder), repo, private, message, token, (model_card.PICTURE, *OPTIONAL))


def write_shared(run: Any, folder: Path, repo: str, raw: bool = False, licence: str | None = None) -> None:
    """Write the files of a run that are uploaded to a folder; arguments and errors are those of `push_to_hub`."""
    state, source = run.model.state_dict(), run.path / CHECKPOINT
    stored, old = checkpoint.load(source, {"model"} if raw else ()) if raw or source.is_file() else ({}, {})
    groups = {"model": stored["model"], "ema": state} if raw else {"model": state}
    config, step = plain(run.config), old.get("step", 0)
    transform = config["data"].get("transform") or {}
    if transform.get("_target_") == LATENTS:
        _write_autoencoder(run.transform, folder / AUTOENCODER)
        transform |= {"run": AUTOENCODER, "weights": "ema"}
    checkpoint.save(folder / CHECKPOINT, groups, {"step": step, "config": config, "raw": raw or run.weights == "raw"})
    write_config(nested(config), folder / CONFIG)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    card = model_card.card(repo, run.path, config, parameters, step or None, licence, run.weights)
    (folder / "README.md").write_text(card)
    named = {model_card.PICTURE: model_card.picture(run.path), **{name: run.path / name for name in BESIDE}}
    for name, path in named.items():
        if path is not None and path.is_file():
            shutil.copyfile(path, folder / name)


def _write_autoencoder(latents: Any, folder: Path) -> None:
    """Write the autoencoder of `TrainedLatents` to a folder, as a run of its own."""
    config = read_config(latents.run)
    state = {"model": latents.autoencoder.state_dict()}
    checkpoint.save(folder / CHECKPOINT, state, {"config": plain(config), "raw": False})
    write_config(config, folder / CONFIG)
