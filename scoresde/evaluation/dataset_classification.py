"""Classification of a dataset by a run's model, with the quality of its probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scoresde.arguments import Count, Few, Positive
from scoresde.build import Run
from scoresde.classify import classify
from scoresde.dequantization import DataMap, Dequantization, Incomplete
from scoresde.divergence import Trace
from scoresde.evaluation.labels import labels_of
from scoresde.evaluation.resumable import Numbers, directory_for, evaluate, fingerprint
from scoresde.metrics.classification import Calibration, accuracy, brier_score, calibration, confusion, log_score
from scoresde.metrics.intervals import Interval
from scoresde.protocols import NULL, Condition, by_name
from scoresde.solvers import Solver
from scoresde.training.batches import split_condition

PARTIAL = "classification"
FORMAT = 1  # of the stored results of batches; those of another format are not read


@dataclass
class DatasetClassification:
    """The posteriors of N labelled samples and their quality.

    Attributes:
        labels: the true classes, int64 (N,).
        indices: the positions of the samples in the dataset, int64 (N,); samples without a label are left out.
        log_posterior: log p(k | x), nats (N, K).
        stderr: standard errors of log_posterior (N, K); None if they are not known.
        draws: numbers of draws for each class, see `classify.Classification`, (N, K).
        nfe, backward: mean numbers of network evaluations and of products with Jacobians per sample.
        conventions: everything that affects the values.
    """

    labels: Tensor
    indices: Tensor
    log_posterior: Tensor
    stderr: Tensor | None
    draws: Tensor
    nfe: float
    backward: float
    conventions: dict[str, str]


@dataclass
class ClassificationQuality:
    """The quality of log-posteriors (N, K), see `metrics.classification`. Scores have a standard error."""

    accuracy: Interval
    log_score: tuple[float, float | None]
    brier: tuple[float, float | None]
    calibration: Calibration
    confusion: Tensor

    @classmethod
    def of(cls, log_posterior: Tensor, labels: Tensor, bins: int = 10) -> "ClassificationQuality":
        """Measure the quality of log-posteriors (N, K) of samples with these labels (N,)."""
        measured = (log_posterior, labels)
        scores = accuracy(*measured), log_score(*measured), brier_score(*measured)
        return cls(*scores, calibration(*measured, bins), confusion(*measured))


def evaluate_classification(
    run: Run,
    dataset: Dataset,
    condition: str,
    prior: Sequence[float] | Tensor,
    dequantization: Dequantization | None,
    method: str = "flow",
    trace: Trace | None = None,
    solver: Solver | None = None,
    samples: Few = 1,
    draws: Few = 128,
    rounds: Few = 4,
    confidence: Positive = 4.0,
    batch_size: Count = 128,
    seed: int = 0,
    progress: bool = True,
) -> DatasetClassification:
    """Classify the samples of a dataset. Sample i draws from seed + i in any batch.

    Under torchrun the batches are shared among processes, with the same result. Finished batches are stored in
    `<run>/classification` until all are complete, so that an interrupted evaluation resumes.

    Args:
        run: supplies the model and its transform.
        dataset: items are (state, condition); those whose label is null (-1) are left out.
        condition: the name of the label. Other conditions of an item are given to the model if it was trained with
            them for every sample; otherwise they are left out.
        prior: the prior of the classes, (K,).
        dequantization: dequantisation of integer grey levels; None for continuous data.
        method, trace, solver, samples, draws, rounds, confidence: see `classify.classify`.
        batch_size: samples at a time.
        seed: the seed of the first sample.
        progress: show a progress bar.

    Raises:
        ValueError: no sample has a label of this name, a label is not one of the K classes; see `classify.classify`.
        Incomplete: the solver failed for some samples; `result` has the others, and NaN for these.
        Interrupted: Ctrl-C.
    """
    labels = labels_of(dataset).get(condition)
    if labels is None or not bool((labels != NULL).any()):
        raise ValueError(
            f"the data must have labels named {condition!r}; got none: set labels in the data of the split"
        )
    indices = (labels != NULL).nonzero().flatten()
    labels = labels[indices]
    if bool((labels >= len(prior)).any()):
        raise ValueError(f"labels must lie in 0 .. {len(prior) - 1}; got {int(labels.max())}")
    options: dict[str, Any] = {"prior": list(map(float, prior)), "method": method, "trace": trace, "solver": solver}
    options |= {"samples": samples, "draws": draws, "rounds": rounds, "confidence": confidence}
    evaluation = _Evaluation(run, dataset, condition, DataMap(run.transform, dequantization), options, seed)
    batches = indices.split(batch_size)
    weights: Any = getattr(dequantization, "state_dict", dict)().values()
    tensors = [*weights, *(part for batch in batches for part in evaluation.tensors(batch))]
    settings = [f"{name}={value}" for name, value in options.items()]
    settings += [
        str(FORMAT),
        condition,
        str(dequantization),
        str(batch_size),
        str(seed),
        fingerprint(run.model, run.transform, tensors),
    ]
    parts = {f"posterior-{i:06d}": partial(evaluation.posterior, batch) for i, batch in enumerate(batches)}
    results = evaluate(parts, directory_for(run.path / PARTIAL, settings), method, progress)
    return _joined(list(results.values()), labels, indices)


@dataclass
class _Evaluation:
    """Posteriors of batches of a dataset; a batch is given by the indices of its samples."""

    run: Run
    dataset: Dataset
    condition: str
    data_map: DataMap
    options: dict[str, Any]
    seed: int

    def posterior(self, indices: Tensor) -> Numbers:
        """Return the class posteriors of a batch, their errors and cost, and the conventions of their likelihoods."""
        x, others = self._load(indices)
        conds = [{**others, self.condition: torch.tensor([k])} for k in range(len(self.options["prior"]))]
        seeds = [self.seed + int(i) for i in indices]
        result = classify(
            self.run.model, x, conds, transform=self.data_map, seeds=seeds, batch_size=len(x), **self.options
        )
        given = {"given": " and ".join(others)} if others else {}
        return {
            "log_posterior": result.log_posterior.tolist(),
            "stderr": None if result.stderr is None else result.stderr.tolist(),
            "draws": result.draws.tolist(),
            "nfe": result.nfe.tolist(),
            "backward": result.backward.tolist(),
            "conventions": result.conventions | given,
        }

    def tensors(self, indices: Tensor) -> list[Tensor]:
        """Return the states of a batch, and the conditions that the model is given beside the label."""
        x, others = self._load(indices)
        return [x, *others.values()]

    def _load(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the states of a batch, and those conditions, apart from the label, that every training sample had."""
        items = default_collate([self.dataset[int(i)] for i in indices])
        cond: Condition
        x, cond = split_condition(items, "cpu")
        needed = getattr(self.run.model, "conditional", ())
        return x, {name: v for name, v in by_name(cond).items() if name in needed and name != self.condition}


def _joined(results: Sequence[Numbers], labels: Tensor, indices: Tensor) -> DatasetClassification:
    """Join the results of the batches; raise Incomplete if the solver failed for samples."""

    def column(key: str) -> Tensor:
        return torch.tensor([row for result in results for row in result[key]], dtype=torch.float64)

    log_posterior = column("log_posterior")
    stderr = None if results[0]["stderr"] is None else column("stderr")
    nfe, backward = (float(column(key).mean()) for key in ("nfe", "backward"))
    draws, declared = column("draws").long(), results[0]["conventions"]
    result = DatasetClassification(labels, indices, log_posterior, stderr, draws, nfe, backward, declared)
    if bool((failed := log_posterior.isnan().any(dim=1)).any()):
        raise Incomplete(
            f"{int(failed.sum())} of {len(labels)} samples have no likelihood for some class (the first are at indices "
            f"{indices[failed][:8].tolist()}): give the solver more steps",
            result,
        )
    return result
