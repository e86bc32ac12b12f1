"""The model card of a run: what the model is, its likelihood with all errors, its conventions, and how to load it.

A card is Markdown with a YAML header, the README.md of a repository on the Hugging Face hub.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scoresde.metrics.features import file_sha256
from scoresde.result_table import plus_minus
from scoresde.training.json_lines import read_lines
from scoresde.training.log import METRICS
from scoresde.training.trainer import CHECKPOINT

PICTURE = "samples.png"
SPLITS = ("test", "validation", "train")
SHOWN = ("sde", "prediction", "network", "data.shape", "data.transform", "data.dequantization", "loss")


def picture(run: Path) -> Path | None:
    """Return the latest picture of samples of a run; None if there is none."""
    figures = [path for name in ("samples_*.png", "step*.png") for path in _by_age((run / "figures").glob(name))]
    return figures[0] if figures else None


def _by_age(paths: Any) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def card(
    repo: str,
    run: Path,
    config: Mapping[str, Any],
    parameters: int,
    step: int | None,
    licence: str | None = None,
    weights: str | float = "ema",
) -> str:
    """Return the model card of a run.

    Args:
        repo: "user/name".
        run: the run's directory; its stored results may be missing.
        config: the run's configuration, a plain mapping.
        parameters: number of trained numbers of the model.
        step: number of training steps; None if unknown.
        licence: identifier of the licence of the weights, such as "cc-by-4.0"; None leaves it out.
        weights: the weights of the model, see `build.load`, whose likelihood the card states.
    """
    line = likelihood(run, weights)
    header: dict[str, Any] = {"library_name": "scoresde", "tags": ["scoresde", "score-based-generative-model"]}
    shape = (config.get("data") or {}).get("shape") or []
    conditions = config.get("conditional")
    if len(shape) == 3:
        header |= (
            {"pipeline_tag": "unconditional-image-generation"}
            if not conditions
            else {"tags": [*header["tags"], "image"]}
        )
    header |= {} if licence is None else {"license": licence}
    name = repo.rsplit("/", 1)[-1]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}",
        "A score-based generative model (diffusion model) trained with scoresde. Load it and draw samples:",
        _code(repo, shape, conditions),
        "## Model\n\n" + _table(_settings(config, parameters, step)),
        "## Likelihood\n\n" + ("No likelihood was measured." if line is None else _likelihood(line)),
    ]
    if picture(run) is not None:
        parts.append(f"## Samples\n\n![Samples of {name}]({PICTURE})")
    return "\n\n".join(parts) + "\n"


def _code(repo: str, shape: list[int], conditions: list[str] | None) -> str:
    states = ", ".join(map(str, ["4", *shape]))
    cond = ", cond=..." if conditions else ""
    return (
        f'```python\nimport scoresde as ss\n\nrun = ss.load("hf://{repo}")  # pip install "scoresde[hub]"\n'
        f"samples = ss.samplers.DDIM()(run.model, shape=({states}){cond}).x\n"
        "data = run.data_map.inverse(samples)  # in the units of the data\n```\n\n"
        f"`scoresde bpd run=hf://{repo}` measures its likelihood, if the data are on your machine; `data.path=FILE` "
        "takes another file."
    )


def likelihood(run: Path, weights: str | float = "ema") -> dict[str, Any] | None:
    """Return the latest stored likelihood of the present checkpoint with these weights; None if there is none.

    It is that of the first split in `SPLITS` that was measured.
    """
    checkpoint = run / CHECKPOINT
    digest = file_sha256(checkpoint) if checkpoint.is_file() else None
    lines = [
        line
        for line in read_lines(run / METRICS)
        if line.get("kind") == "likelihood"
        and line.get("guidance") is None
        and str(line.get("weights", "ema")) == str(weights)
        and (line.get("provenance") or {}).get("checkpoint") in (None, digest)
    ]
    by_split = {line.get("split"): line for line in lines}
    return next((by_split[split] for split in SPLITS if split in by_split), None)


def _settings(config: Mapping[str, Any], parameters: int, step: int | None) -> dict[str, str]:
    rows = {}
    for key in SHOWN:
        value: Any = config
        for name in key.split("."):
            value = (value or {}).get(name)
        if value is not None:
            rows[key.rsplit(".", 1)[-1]] = described(value)
    if train := (config.get("data") or {}).get("train"):
        rows["training data"] = f"`{str(train.get('_target_', 'unknown')).rsplit('.', 1)[-1]}`"
    rows["parameters"] = f"{parameters:,}"
    if step:
        rows["training steps"] = f"{step:,}"
    if config.get("conditional"):
        rows["conditions"] = ", ".join(config["conditional"])
    return rows


def described(node: Any) -> str:
    """Return a node of a configuration as a call of its class, with arguments that are numbers or short texts."""
    if not isinstance(node, Mapping):
        return str(node)
    name = str(node.get("_target_", "unknown")).rsplit(".", 1)[-1]
    simple = {key: value for key, value in node.items() if isinstance(value, (int, float, str)) and key[0] != "_"}
    return f"`{name}({', '.join(f'{key}={value}' for key, value in simple.items())})`"


def _likelihood(line: Mapping[str, Any]) -> str:
    """Return the mean with its standard error, the parts of the error, the bound and the conventions."""
    mean = f"**{_number(line['mean'], line.get('stderr'))} {line.get('unit', '')}**"
    rows = {
        f"{line.get('split', 'test')} data, {line['n']:,} samples": mean,
        "error from the choice of samples": _error(line.get("population")),
        "error from probes and dequantisation": _error(line.get("monte_carlo")),
        "change under a finer solve": _estimate(line.get("discretisation")),
        "evidence bound": _estimate(line.get("bound")),
    }
    conventions = {**(line.get("conventions") or {})}
    bound = {f"{name} (bound)": value for name, value in (line.get("bound_conventions") or {}).items()}
    conventions |= {name: value for name, value in bound.items() if rows["evidence bound"]}
    text = _table({name: value for name, value in rows.items() if value})
    return text + (
        "" if not conventions else "\n\nConventions:\n\n" + _table({k: str(v) for k, v in conventions.items()})
    )


def _number(value: float, error: float | None) -> str:
    return plus_minus(value, error).replace("+-", "±")


def _error(value: float | None) -> str:
    return "" if value is None else f"± {value:.4f}"


def _estimate(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else _number(value["mean"], value.get("stderr"))


def _table(rows: Mapping[str, str]) -> str:
    cells = [(name, re.sub(r"\s+", " ", value).replace("|", "\\|")) for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in cells)])
