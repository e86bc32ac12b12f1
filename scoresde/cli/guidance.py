"""The Hydra config group `guidance`: a constructor of `scoresde.guidance`, with all its arguments except the model.

The arguments `classifier` and `weak` are other models: the configuration has paths of their runs, which are loaded
here. The guided model takes its conditions by `given`, as other models do. The setting `threshold`, a constructor of
`scoresde.thresholding`, is applied to the guided model.
"""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scoresde import build, run_config
from scoresde.arguments import check
from scoresde.cli.common import check_run
from scoresde.cli.settings import Directory
from scoresde.evaluation.conditions import accepted, data_conditions
from scoresde.evaluation.labels import class_names, classes_of
from scoresde.protocols import Condition
from scoresde.wrappers import ModelWrapper

GROUP = "guidance"
# Arguments that are paths of runs, and the functions that load them.
RUNS: dict[str, Callable[..., Any]] = {
    "classifier": build.load_classifier,
    "weak": lambda *arguments: build.load(*arguments).model,
}


def guided(run: build.Run, config: DictConfig, scale: float | None = None, with_threshold: bool = True) -> Any:
    """Return the model of a run with the guidance and the threshold of a configuration.

    Args:
        run: the run.
        config: a configuration with `guidance`, and perhaps `threshold`.
        scale: a scale in place of `guidance.scale`.
        with_threshold: if False, leave out the threshold, because a model with a threshold has no density.

    Raises:
        ValueError: the run of `classifier` or `weak` has other data than `run`; see also `build.instantiate` and
            `build.load`.
    """
    model: Any = run.model
    node = config.get(GROUP)
    if node is not None:
        others = {str(name): load_beside(run, node[name], RUNS[name], config) for name in node if name in RUNS}
        if "classifier" in others:
            others["joint"] = bool(accepted(run) or run.model.conditional)
        if scale is not None:
            others["scale"] = scale
        rest = OmegaConf.masked_copy(node, [key for key in node if key not in others])
        model = build.instantiate(rest, config.trust, ModelWrapper, model=model, **others)
    if with_threshold and config.get("threshold") is not None:
        model = build.instantiate(config.threshold, config.trust, ModelWrapper, model=model)
    return model


def load_beside(run: build.Run, value: Any, load: Callable[..., Any], config: DictConfig) -> Any:
    """Return the classifier or model that `value` describes, by the path of a run or by a configuration.

    Raises:
        ValueError: the run at that path has other data than `run`.
    """
    if OmegaConf.is_config(value):
        return build.instantiate(value, config.trust)
    path = check_run(value)
    for key in ("shape", "transform"):
        own, other = (run_config.plain(part.data).get(key) for part in (run.config, run_config.read_config(path)))
        if own != other:
            raise ValueError(
                f"{path} must be trained on the same data as {run.path}: its data.{key} is {other}, not {own}"
            )
    return load(path, "ema", config.trust, config.device)


def labels_of_data(run: build.Run, config: DictConfig, n: int) -> Condition:
    """Return conditions for n samples: the conditions of n items of the split `config.split`.

    Raises:
        ValueError: a classifier guides samples, and the data have no labels.
    """
    cond = data_conditions(run, config.split, n, config.trust)
    if cond is None and config.guidance is not None and "classifier" in config.guidance:
        raise ValueError(
            f"a classifier guides samples to labels, which the {config.split} data of {run.path} do not have: train "
            "with labels (data.labels=true), or draw samples of a class with `scoresde sample cond.label=...`"
        )
    return cond


def known_classes(run: build.Run, config: DictConfig) -> dict[str, list[str]]:
    """Return the class names of each label of a run; if the run has none, those of its guiding classifier."""
    names = classes_of(run)
    node = config.get(GROUP)
    path = None if node is None else node.get("classifier")
    if names or path is None or OmegaConf.is_config(path):
        return names
    return class_names(run_config.read_config(check_run(path)))


def checked_nodes(node: Any, has_scales: bool) -> list[Any]:
    """Return the setting `guidance` as nodes that can be checked against the arguments of its constructor.

    Paths of runs, which the constructor does not accept, are checked here and left out. A list of scales gives a node
    for each scale.

    Args:
        node: the setting, or None.
        has_scales: whether `scale` may be a list.

    Raises:
        ValueError: the path of a run is not a text.
    """
    if not OmegaConf.is_dict(node):
        return [node]
    paths = [name for name in node if name in RUNS and not OmegaConf.is_config(node._get_node(name))]
    for name in paths:
        if not OmegaConf.is_missing(node, name):
            check(f"{GROUP}.{name}", node[name], Directory)
    rest = OmegaConf.masked_copy(node, [name for name in node if name not in paths])
    scales = node.get("scale")
    if not (has_scales and OmegaConf.is_list(scales) and len(scales)):
        return [rest]
    copies = [rest.copy() for _ in scales]
    for copy, scale in zip(copies, scales, strict=True):
        copy.scale = scale
    return copies
