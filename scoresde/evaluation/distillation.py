"""Distillation of a run into solvers or models that need few evaluations: the methods of `scoresde distill`.

A method is a function of a `Teacher` that yields one row of results for each file or folder that it stores in the
directory of the run. The rows go to `metrics.jsonl`, and `table` shows them. `SolverDistillation` learns the
coefficients of samplers (`samplers.learning`) and stores them as `<run>/<folder>/nfe<n>.safetensors`, which
`sampler=learned` reads. `LikelihoodSolverDistillation` learns solvers of the likelihood (`scoresde.adams_learning`) and
stores them as `<run>/<folder>/steps<n>.safetensors`, which `likelihood=learned` reads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from scoresde.adams_learning import AdamsLearner, AdamsLearning
from scoresde.arguments import Count, Distinct, Few, checked
from scoresde.build import Run
from scoresde.evaluation.conditions import data_conditions
from scoresde.evaluation.references import data_states
from scoresde.protocols import Condition, Model
from scoresde.samplers.learned_solver import SolverTable, solver_file
from scoresde.samplers.learning import Learner, check_nfe
from scoresde.samplers.solver_fit import Learning
from scoresde.solvers import AdamsTable
from scoresde.solvers.learned_adams import table_file

Row = dict[str, Any]
CONDITIONS = 1000  # conditions of the data from which starts draw


@dataclass(frozen=True)
class Teacher:
    """The run that a method distils, with its settings.

    Attributes:
        run: the run.
        model: the model of the run, perhaps guided.
        conditions: a function n -> conditions of n samples with the frequencies of the data, or None if unconditional.
        seed: the seed of all random draws.
        again: whether to replace stored results; if False, they are kept.
        progress: whether to show progress bars.
        trust: see `build.instantiate`.
    """

    run: Run
    model: Model
    conditions: Callable[[int], Condition]
    seed: int
    again: bool = False
    progress: bool = False
    trust: Sequence[str] = ()


class Distillation(Protocol):
    """A method of distillation, see the module docstring."""

    def __call__(self, teacher: Teacher) -> Iterator[Row]: ...
    def table(self, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]: ...


@checked
class SolverDistillation:
    """Learn a solver for each number of evaluations; stored solvers are kept, unless `Teacher.again`.

    Args:
        nfe: numbers of evaluations.
        folder: the folder in the directory of the run. For a guided model choose another one than "solvers".
        options: arguments of `samplers.Learning`.
    """

    def __init__(
        self,
        nfe: Annotated[Sequence[Few], Distinct(least=1)],
        folder: str = "solvers",
        **options: Annotated[Any, Learning],
    ):
        self.nfe, self.folder, self.learning = list(nfe), folder, Learning(**options)
        for count in self.nfe:
            check_nfe(count, self.learning)

    def __call__(self, teacher: Teacher) -> Iterator[Row]:
        """Yield a row for each number of evaluations, after its solver is stored."""
        directory, learner = teacher.run.path / self.folder, None
        for nfe in self.nfe:
            path = solver_file(directory, nfe)
            is_kept = path.is_file() and not teacher.again
            if is_kept:
                table = SolverTable.load(path)
                table.check_path(teacher.model.sde)
            else:
                if learner is None:  # its starts serve every number of evaluations
                    cond, shape = teacher.conditions(CONDITIONS), list(teacher.run.config.data.shape)
                    learner = Learner(teacher.model, shape, cond, self.learning, teacher.seed, teacher.progress)
                table = learner.learn(nfe).table
                table.save(path)
            yield {"nfe": nfe, **table.notes, "kept": is_kept, "file": str(path.relative_to(teacher.run.path))}

    def table(self, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Return the cells of a table: root mean square and median distance to the flow on held-out starts."""
        lines = [["NFE", "learned", "median", "best formula", "its distance", "its median", "ratio", "seconds"]]
        for row in rows:
            ratio = row["rms"] / row["formula_rms"] if row["formula_rms"] else 1.0
            numbers = [f"{row[name]:.4g}" for name in ("rms", "median")]
            formula = [row["formula"], *(f"{row[name]:.4g}" for name in ("formula_rms", "formula_median"))]
            seconds = "kept" if row["kept"] else f"{row['seconds']:.0f}"
            lines.append([str(row["nfe"]), *numbers, *formula, f"{ratio:.2f}", seconds])
        return lines


@checked
class LikelihoodSolverDistillation:
    """Learn a likelihood's solver for each number of steps; stored solvers are kept, unless `Teacher.again`.

    The data are evenly spaced in the training split, dequantised as in training.

    Args:
        steps: numbers of steps.
        folder: the folder in the directory of the run. For a guided model choose another one.
        samples: number of samples of the data; `AdamsLearning.held_out` is the share held out.
        options: arguments of `AdamsLearning`.
    """

    def __init__(
        self,
        steps: Annotated[Sequence[Few], Distinct(least=1)],
        folder: str = "likelihood_solvers",
        samples: Count = 288,
        **options: Annotated[Any, AdamsLearning],
    ):
        self.steps, self.folder, self.samples = list(steps), folder, samples
        self.learning = AdamsLearning(**options)

    def __call__(self, teacher: Teacher) -> Iterator[Row]:
        """Yield a row for each number of steps, after its solver is stored."""
        learner = None
        for steps in self.steps:
            path = table_file(teacher.run.path / self.folder, steps)
            is_kept = path.is_file() and not teacher.again
            if is_kept:
                table = AdamsTable.load(path)
            else:
                if learner is None:  # its accurate values serve every number of steps
                    learner = self._learner(teacher)
                table = learner.learn(steps).table
                table.save(path)
            yield {"steps": steps, **table.notes, "kept": is_kept, "file": str(path.relative_to(teacher.run.path))}

    def _learner(self, teacher: Teacher) -> AdamsLearner:
        x = data_states(teacher.run, "train", self.samples, teacher.seed, teacher.trust)
        is_conditional = teacher.conditions(1) is not None
        cond = data_conditions(teacher.run, "train", len(x), teacher.trust) if is_conditional else None
        seed, shown = teacher.seed, teacher.progress
        return AdamsLearner(teacher.model, x, cond, settings=self.learning, seed=seed, progress=shown)

    def table(self, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Return the cells of a table: errors of log p on held-out data, nats per dimension."""
        lines = [["steps", "learned, rms", "median", "mean", "Adams, rms", "median", "mean", "ratio", "seconds"]]
        for row in rows:
            names = ("rms", "median", "mean", "adams_rms", "adams_median", "adams_mean")
            ratio = row["rms"] / row["adams_rms"] if row["adams_rms"] else 1.0
            seconds = "kept" if row["kept"] else f"{row['seconds']:.0f}"
            lines.append([str(row["steps"]), *(f"{row[name]:.2e}" for name in names), f"{ratio:.2f}", seconds])
        return lines
