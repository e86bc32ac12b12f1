"""The configuration of a run that was made in Python, so that `scoresde.load` and the command line read it.

Every object of the run is described by its class and the arguments of its constructor (`configured.described`). The
node `own` lists the parts that no configuration can build again, with the names of their classes: objects of classes
outside this library and torch, and those with functions or very large tensors among their arguments.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from scoresde.classifier import NoisyClassifier
from scoresde.configured import NotDescribed, described, full_name, remembered, with_defaults
from scoresde.contrastive import ContrastiveModel
from scoresde.data import in_memory
from scoresde.data.summary import state_of
from scoresde.flowmaps import DenoisingGenerator, FlowMap
from scoresde.pipelines import Autoencoder
from scoresde.run_config import OWN, column_names_of
from scoresde.score import ScoreModel
from scoresde.training import distributed
from scoresde.training.trainer import Trainer

KINDS: dict[type, str | None] = {
    ScoreModel: None,
    FlowMap: "flow_map",
    DenoisingGenerator: "generator",
    NoisyClassifier: "classifier",
    ContrastiveModel: "contrastive",
}
"""The node of a configuration with the arguments that a class of models has besides those of `ScoreModel`."""
COMMON = ("network", "sde", "prediction", "learned_variance", "conditional")


class Description:
    """Nodes of a configuration; `own` gets the names of the parts that no configuration can build."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}
        self.own: dict[str, str] = {}

    def add(self, name: str, value: Any) -> None:
        """Add the description of a part, or its class to `own` and None in its place."""
        self.nodes[name] = self.node(name, value)

    def node(self, name: str, value: Any) -> Any:
        """Return the description of a part; if there is none, add its class to `own` and return None."""
        try:
            return described(value)
        except NotDescribed:
            self.own[name] = full_name(value)
            return None

    def add_model(self, model: Any) -> None:
        """Add the nodes from which `build.build_model` builds the model."""
        if type(model) is Autoencoder and (density := self.node("model", model.density)) is not None:
            self.add("network", model.network)
            self.nodes |= {"sde": None, "prediction": None, "autoencoder": {"density": density}}
            return
        if type(model) not in KINDS:
            self.own["model"] = full_name(model)
            for name in ("network", "sde", "prediction"):
                try:
                    self.nodes[name] = described(getattr(model, name, None))
                except NotDescribed:
                    self.nodes[name] = None
            return
        for name in ("network", "sde", "prediction"):
            self.add(name, getattr(model, name))
        self.nodes["learned_variance"] = getattr(model, "learned_variance", False)
        arguments = with_defaults(type(model), remembered(model) or {})
        if kind := KINDS[type(model)]:
            rest = described({name: value for name, value in arguments.items() if name not in COMMON})
            self.nodes[kind] = rest if hasattr(model, "predict") else True  # a classifier has no further arguments


def run_config_of(
    path: Path,
    model: Any,
    trainer: Trainer,
    parts: Mapping[str, Any],
    splits: Mapping[str, Any],
    data: Mapping[str, Any],
    class_names: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the configuration of a run, as nested dicts and lists.

    Args:
        path: the directory of the run. Held-out data that the configuration cannot describe are written there, as
            `validation.npz` and `test.npz`.
        model: the model.
        trainer: the trainer.
        parts: the loss and the sampler, by name.
        splits: the datasets "train", "validation" and "test", or None.
        data: the transform and the dequantisation, by name.
        class_names: names of the classes of each condition.
    """
    found = Description()
    found.add_model(model)
    for name, part in {**parts, "optimizer": trainer.optimizer}.items():
        found.add(name, part)
    settings = described({name: value for name, value in vars(trainer).items() if name not in ("optimizer", "where")})
    dropout = settings.pop("condition_dropout")
    levels = getattr(data["transform"], "levels", None)
    shape = list(getattr(data["transform"], "state_shape", None) or state_of(splits["train"][0]).shape)
    nodes = {name: _split_node(path, name, dataset) for name, dataset in splits.items()}
    return {
        "device": trainer.device,
        "seed": trainer.seed,
        "trust": [],
        "run": str(path),
        **found.nodes,
        "conditional": list(getattr(model, "conditional", ())) or None,
        "class_names": class_names,
        "column_names": column_names_of(splits["train"]),
        "data": {
            "shape": shape,
            "range": [0, levels] if levels else None,
            "text": (nodes["train"] or {}).get("text"),
            **nodes,
            **{name: found.node(name, part) for name, part in data.items()},
        },
        "trainer": {"_target_": "scoresde.training.Trainer", **settings},
        "condition": {"dropout": dropout},
        "held_out": {"samples": 256, "draws": 8, "batch_size": 128},
        OWN: found.own,
    }


def _split_node(path: Path, name: str, dataset: Any) -> Any:
    """Return the configuration of a split; data in memory are written to the run's directory, except training data."""
    if dataset is None:
        return None
    if not in_memory.is_in_memory(dataset):
        with suppress(NotDescribed):
            return described(dataset)
    if name == "train":
        return None
    file = path / f"{name}.npz"
    if distributed.rank() == 0:
        in_memory.save_arrays(dataset, file)
    distributed.gather(None)  # no process reads the file before it is written
    return described(in_memory.saved_arrays(dataset, file))
