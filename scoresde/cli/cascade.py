"""Cascades on the command line: `run=[FIRST,...,LAST]`, directories of runs from the smallest images to the largest.

`scoresde sample` and `scoresde bpd` take such a list, see also `cli.run_lists`. Results are stored in the directory of
the last run. Guidance and a threshold act on the first stage.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import default_collate

from scoresde import build, run_config
from scoresde.cli.common import check_run, result_name, run_data, warnings_on_stderr
from scoresde.cli.conditions import Drawing
from scoresde.cli.guidance import guided, known_classes
from scoresde.cli.output import Record, append_row, print_rows, shows_progress
from scoresde.evaluation.conditions import accepted
from scoresde.evaluation.dataset_likelihood import Estimate
from scoresde.evaluation.labels import classes_of
from scoresde.evaluation.records import METRICS, keep_per_sample
from scoresde.pipelines import Cascade, CascadeBits, CascadeLogProb
from scoresde.protocols import CaptionEncoder
from scoresde.tensors import dimensions, mean_and_error
from scoresde.training import distributed
from scoresde.training.batches import split_condition


def is_cascade(config: DictConfig) -> bool:
    """Return whether the setting `run` is a list of runs."""
    return OmegaConf.is_list(config.run)


def is_later_stage(trained: DictConfig) -> bool:
    """Return whether the configuration of a run says that it was trained for super-resolution."""
    return "resolutions" in (trained.get("loss") or {})


def load_runs(config: DictConfig, device: str) -> list[build.Run]:
    """Load the run at the path `config.run`, or all runs of a cascade, with the weights `config.weights`."""
    paths = config.run if is_cascade(config) else [config.run]
    if is_cascade(config) and distributed.size() > 1:
        raise ValueError("a cascade must run in one process; got several processes of torchrun: start one")
    return [build.load(check_run(path), config.weights, config.trust, device) for path in paths]


def cascade_of(runs: Sequence[build.Run], config: DictConfig, with_threshold: bool = True) -> Cascade:
    """Return the cascade of runs, with the guidance and the threshold of a configuration on the first stage."""
    stages = [run.stage for run in runs]
    model = guided(runs[0], config, with_threshold=with_threshold)
    return Cascade([replace(stages[0], model=model), *stages[1:]])


def known_conditions(
    runs: Sequence[build.Run], config: DictConfig
) -> tuple[dict[str, list[str]], list[str] | None, CaptionEncoder | None]:
    """Return the conditions of all stages, as the arguments `classes`, `others` and `text` of `cli.conditions.drawing`.

    Raises:
        ValueError: two runs have different classes of one label.
    """
    classes, accepts = known_classes(runs[0], config), [accepted(run) for run in runs]
    recorded: dict[str, list[str]] = {}
    for run in runs:
        own = run.config.get("class_names") or {}
        for name, names in classes_of(run).items():
            if name in own and recorded.setdefault(name, names) != names:
                raise ValueError(
                    f"the runs of a cascade must have the same classes of {name}; those of {run.path} differ"
                )
            classes[name] = recorded.get(name, names)
    made = ["image"] if len(runs) > 1 else []  # a cascade makes this condition itself
    others = None if None in accepts else sorted({name for part in accepts for name in part or ()} - {*classes, *made})
    texts = [run.text for run in runs if run.text is not None]
    return classes, others, texts[0] if len(texts) == 1 else SharedText(texts) if texts else None


@dataclass(frozen=True)
class SharedText:
    """The encoders of captions of several runs, which must give the same numbers to the same words."""

    texts: Sequence[CaptionEncoder]

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for text in self.texts:
            for name, part in text(captions).items():
                if not torch.equal(parts.setdefault(name, part).nan_to_num(), part.nan_to_num()):
                    raise ValueError(
                        "the runs of a cascade must encode captions alike; their encoders differ: train the later runs "
                        "with data.text.file=FIRST/tokenizer.json, or all with one frozen encoder and length"
                    )
        return parts

    def check(self, captions: Sequence[str]) -> None:
        for text in self.texts:
            text.check(captions)


def draw_cascade(runs: Sequence[build.Run], config: DictConfig, drawn: Drawing, cond: Any) -> tuple[Tensor, Record]:
    """Draw samples of a cascade; arguments and result are those of `cli.sample.draw`."""
    sampler, started = build.instantiate(config.sampler, config.trust), time.perf_counter()
    seeds = [config.seed + i % drawn.columns for i in range(drawn.n)]
    options = {"augmentation": _plain(config.augmentation), "batch_size": config.batch_size}
    cascade, shown = cascade_of(runs, config), shows_progress()
    result = cascade.sample(drawn.n, drawn.cond, seeds, sampler, progress=shown, **options)
    seconds = round(time.perf_counter() - started, 2)
    row: Record = {"sampler": HydraConfig.get().runtime.choices["sampler"], "n": drawn.n, "nfe": result.nfe}
    row |= {"backward": result.backward, "seconds": seconds, "seed": config.seed, "cond": cond}
    row |= _settings(runs, config)
    return result.x.cpu(), {**row, "threshold": _plain(config.threshold)}


def cascade_bpd(config: DictConfig) -> Record:
    """Measure the likelihood of a cascade on a split of the data of its last run, with the part of each stage.

    The unit and the errors are those of `pipelines.Cascade.log_prob`; `budget` is not used.

    Raises:
        ValueError: settings of a likelihood that a cascade does not take.
    """
    device = distributed.device(config.device)
    runs = load_runs(config, device)
    top, options = runs[-1], build.instantiate(config.likelihood, config.trust)
    refused = {"samples": 1, "start": "data", "tolerance": None, "levels": None, "surrogate": None}
    wrong = [f"likelihood.{key}" for key, value in refused.items() if options.pop(key, value) != value]
    wrong += ["dequantization"] * (config.dequantization is not None) + ["conditional"] * (not config.conditional)
    wrong += [f"data.{key}" for key, value in config.data.items() if value is not None]
    if wrong:
        raise ValueError(f"{wrong[0]} must have its default for a cascade; got another value: leave it out")
    split = config.split or "test"
    dataset, cascade = run_data(top, split, config.trust), cascade_of(runs, config, with_threshold=False)
    x, cond = split_condition(default_collate([dataset[i] for i in range(len(dataset))]), device)
    started, seeds = time.perf_counter(), range(config.seed, config.seed + len(x))
    shared = {**options, "seeds": seeds, "augmentation": _plain(config.augmentation)}
    found: CascadeBits | CascadeLogProb
    with warnings_on_stderr():
        if top.dequantization is not None:
            found = bits = cascade.bits_per_dim(x, cond, **shared)
            unit, values, parts = "bits/dim", bits.per_image, bits.stages
        else:
            found = nats = cascade.log_prob(x, cond, **shared)
            unit, values, parts = "nats/dim", -nats.value / dimensions(x), -nats.stages / dimensions(x)
    terms = [Estimate(*mean_and_error(part)) for part in parts.T]
    (mean, stderr), seconds = mean_and_error(values), round(time.perf_counter() - started, 2)
    file = keep_per_sample(top.path, result_name(f"{split}_cascade", "split"), values, stages=parts)
    row: Record = {"kind": "cascade_likelihood", "split": split, "n": len(x), "unit": unit}
    row |= {"mean": mean, "stderr": stderr, "stages": [asdict(term) for term in terms]}
    row |= {"conventions": found.conventions, "nfe": float(found.nfe.double().mean()), "seed": config.seed}
    row |= {**_settings(runs, config), "seconds": seconds, "file": file.name}
    row = append_row(top.path, row, device)
    names = {f"  {path}": str(term) for path, term in zip(row["cascade"], terms, strict=True)}
    shown = {f"{split} {unit}": f"{Estimate(mean, stderr)} (standard error over {len(x)} samples)", **names}
    print_rows({**shown, **found.conventions, "seconds": seconds, "metrics": top.path / METRICS})
    return {"run": top.path, "rows": [row], "paths": {"metrics": top.path / METRICS, "per_sample": file}}


def _settings(runs: Sequence[build.Run], config: DictConfig) -> Record:
    """Return the settings of a cascade for a row of `metrics.jsonl`."""
    names = {"cascade": [str(run.path) for run in runs], "augmentation": _plain(config.augmentation)}
    return {**names, **{key: _plain(config[key]) for key in ("weights", "guidance")}}


def _plain(value: Any) -> Any:
    return run_config.plain(value) if OmegaConf.is_config(value) else value
