"""Distillation of a run into a flow map: a method of `scoresde distill`, see `evaluation.distillation`.

The student is a run of its own in a folder of the teacher's run. Its network is that of the teacher with more output
channels, an embedding of the target time and no dropout; at first its jumps are DDIM steps of the teacher.
`Trainer.fit` trains it on the teacher's training data, and the same command resumes an interrupted training. `ss.load`
reads the student, and `sampler=flow_map` and `likelihood=jumps` use it.
"""

import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.utils.data import Dataset

from scoresde import build, run_config
from scoresde.arguments import CountOrZero, Named, Positive, annotations_of, checked
from scoresde.data.transforms import Affine
from scoresde.dequantization import DataMap
from scoresde.evaluation.distillation import Row, Teacher
from scoresde.flowmaps import StoredTrajectories, TrajectoryDistillation
from scoresde.flowmaps.flow_map_objective import FlowMapObjective
from scoresde.flowmaps.stored_trajectories import stored_solutions
from scoresde.losses import Objective
from scoresde.networks import add_lora
from scoresde.score import device_of
from scoresde.training import checkpoint, distributed
from scoresde.training.batches import fitting
from scoresde.training.json_lines import read_lines
from scoresde.training.trainer import CHECKPOINT, LOG, Trainer

BETAS = (0.9, 0.99)  # of Adam
SOLUTIONS = "solutions.safetensors"


@checked
class FlowMapDistillation:
    """Train a flow map from the model of a run.

    Args:
        objective: a function teacher -> objective, such as `MeanFlow` with `_partial_: true`.
        rate: the largest learning rate of Adam.
        folder: the folder of the flow map in the directory of the run.
        data_scale: S of `flowmaps.angle`; default: `data.sigma_data` of the run's configuration, or 1.
        targets, divergence: see `FlowMap`.
        solutions: number of solutions of the teacher's flow that are computed before the training and stored in the
            folder; batches are then drawn from them (`flowmaps.stored_trajectories`). The objective must be
            `TrajectoryDistillation`, and the data without conditions. 0 solves the flow anew for each batch.
        lora: rank of the adapters that are trained in place of the network's weights (`networks.lora`); 0 trains the
            weights.
        options: arguments of `Trainer`, except its optimiser, seed and device.
    """

    def __init__(
        self,
        objective: Callable[..., FlowMapObjective],
        rate: Positive = 1e-3,
        folder: Annotated[str, Named("the name of a folder")] = "flow_map",
        data_scale: Positive | None = None,
        targets: Literal["all", "down", "data"] = "all",
        divergence: bool = True,
        solutions: CountOrZero = 0,
        lora: CountOrZero = 0,
        **options: Annotated[Any, Trainer],
    ):
        self.objective, self.rate, self.folder, self.data_scale = objective, rate, folder, data_scale
        self.targets, self.divergence, self.lora, self.options = targets, divergence, lora, options
        self.solutions = solutions

    def __call__(self, teacher: Teacher) -> Iterator[Row]:
        """Train the flow map, or resume its training, and yield its row.

        Raises:
            ValueError: the run has no training data; see also `configuration`, `FlowMap.start_from`, and
                `_check_resumable`.
        """
        path, stored = teacher.run.path / self.folder, self.configuration(teacher)
        config = run_config.nested(stored)
        dataset = build.instantiate(config.data.get("train"), teacher.trust, Dataset | None)
        if dataset is None:
            raise ValueError(f"{teacher.run.path} has no training data: set data.train in its {run_config.CONFIG}")
        torch.manual_seed(teacher.seed)
        model: Any = build.build_model(run_config.nested({**stored, "lora": 0}), teacher.trust)
        model.to(device_of(teacher.run.model)).start_from(teacher.run.model)
        if self.lora:
            add_lora(model.network, self.lora)
        before = self._check_resumable(path, stored, teacher.again)
        started = time.perf_counter()
        if distributed.rank() == 0:
            run_config.write_config(config, path / run_config.CONFIG)
        data_map = build.build_data_map(config.data.get("training") or config.data, teacher.trust)
        dataset, data_map = self._trained_on(teacher, model, dataset, data_map, path)
        loss, trainer = self.loss(teacher), self._trainer(teacher, dataset)
        shown: Any = {"progress": teacher.progress, "config": stored}
        trainer.fit(model, loss, dataset, path, data_map, **shown)
        last = next((line["loss"] for line in reversed(read_lines(path / LOG)) if "loss" in line), None)
        seconds = round(time.perf_counter() - started, 2)
        row = {"objective": stored["loss"]["_target_"], "steps": trainer.steps, "loss": last, "seconds": seconds}
        yield {**row, "kept": before == trainer.steps, "file": self.folder}

    def loss(self, teacher: Teacher) -> Objective:
        """Return the objective of the training."""
        return self.distillation(teacher)

    def distillation(self, teacher: Teacher) -> FlowMapObjective:
        """Return the objective of the distillation.

        Raises:
            ValueError: `solutions` is set and the objective is not `TrajectoryDistillation`.
        """
        objective = self.objective(teacher.model)
        if not self.solutions:
            return objective
        if not isinstance(objective, TrajectoryDistillation):
            name = type(objective).__name__
            raise ValueError(f"solutions needs method=trajectories; got {self.solutions} with {name}: set solutions=0")
        return StoredTrajectories(objective, list(teacher.run.config.data.shape))

    def _trained_on(
        self, teacher: Teacher, model: Any, dataset: Dataset, data_map: DataMap, path: Path
    ) -> tuple[Dataset, DataMap]:
        """Return the data to train on and its map: solutions of the teacher's flow, if `solutions` is set."""
        if not self.solutions:
            return dataset, data_map
        self.distillation(teacher)  # checks the objective before the flow is solved
        parts: Any = self.objective(teacher.model), model, dataset, data_map, self.solutions, teacher.seed
        if distributed.rank() == 0:
            stored_solutions(path / SOLUTIONS, *parts)
        distributed.gather(None)  # wait for the file
        return stored_solutions(path / SOLUTIONS, *parts), DataMap(Affine())

    def _trainer(self, teacher: Teacher, dataset: Dataset) -> Trainer:
        size = fitting(self.options.get("batch_size", Trainer.batch_size), dataset)
        device = str(device_of(teacher.run.model) or "cpu")
        settings = {**self.options, "batch_size": size, "seed": teacher.seed, "device": device}
        return Trainer(partial(torch.optim.Adam, lr=self.rate, betas=BETAS), **settings)

    def configuration(self, teacher: Teacher) -> dict[str, Any]:
        """Return the configuration of the student: that of the run, with a flow map in place of its model.

        Raises:
            ValueError: the network cannot have more output channels, or the run has a learned variance.
        """
        config, path = run_config.plain(teacher.run.config), teacher.run.path
        target = str(config["network"].get("_target_"))
        if "out_channels" not in annotations_of(pkgutil.resolve_name(target)):
            raise ValueError(
                f"a flow map needs a network with the argument out_channels; the network of {path} is {target}: train "
                "a run with network=mlp, unet or dit, and distil that"
            )
        if config.get("learned_variance"):
            raise ValueError(f"a flow map needs a model without learned variance; {path} has one")
        objective: Any = self.objective
        scale = self.data_scale or config["data"].get("sigma_data") or 1.0
        channels = 2 * config["data"]["shape"][0] + self.divergence
        parts = {"data_scale": float(scale), "correction": True, "divergence": self.divergence, "targets": self.targets}
        function = getattr(objective, "func", objective)
        loss = {"_target_": f"{function.__module__}.{function.__qualname__}", **getattr(objective, "keywords", {})}
        loss |= {"solutions": self.solutions} if self.solutions else {}
        return config | {
            "network": _without_dropout(config["network"]) | {"out_channels": channels},
            "flow_map": parts,
            "lora": self.lora,
            "loss": loss,
            "optimizer": {"_target_": "torch.optim.Adam", "lr": self.rate, "betas": list(BETAS)},
            "trainer": {"_target_": "scoresde.training.Trainer", **self.options},
            "distilled_from": str(path),
        }

    def _check_resumable(self, path: Path, settings: Mapping[str, Any], again: bool) -> int:
        """Return the number of steps that the stored training has done.

        Raises:
            ValueError: the folder has a training with other settings, or `again` is set and it has any training.
        """
        if not (path / CHECKPOINT).exists():
            return 0
        if again:
            raise ValueError(
                f"again=true does not replace a training, and {path} has a flow map: remove that folder, or choose "
                "another with method.folder=..."
            )
        stored = checkpoint.load(path / CHECKPOINT, set(), keys=["step"])[1]
        if change := run_config.changed_setting(stored.get("config") or {}, settings):
            raise ValueError(f"{path} has another flow map ({change}): choose another folder with method.folder=...")
        return int(stored["step"])

    def table(self, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Return the cells of a table: the objective, its steps, the last loss and the seconds."""
        lines = [["objective", "steps", "loss", "seconds", "folder"]]
        for row in rows:
            loss = "" if row["loss"] is None else f"{row['loss']:.4g}"
            seconds = "kept" if row["kept"] else f"{row['seconds']:.0f}"
            lines.append([row["objective"].rsplit(".", 1)[-1], str(row["steps"]), loss, seconds, row["file"]])
        return lines


def _without_dropout(settings: Any) -> Any:
    """Return the settings of a network without dropout, whose noise a regression on exact targets would average."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: 0.0 if name == "dropout" else _without_dropout(value) for name, value in settings.items()}
