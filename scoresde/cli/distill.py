"""`scoresde distill`: learn a few-step solver or a flow map from a run; see `evaluation.distillation`."""

from omegaconf import DictConfig

from scoresde import build
from scoresde.cli.common import load_run
from scoresde.cli.guidance import guided, labels_of_data
from scoresde.cli.output import Record, append_row, print_rows, print_table, shows_progress
from scoresde.cli.sample import describe_guidance, plain
from scoresde.cli.settings import Method
from scoresde.evaluation.distillation import Teacher
from scoresde.evaluation.records import METRICS
from scoresde.protocols import Condition


def distill(config: DictConfig) -> Record:
    """Distil a run: learn solvers for few evaluations of its model, or train a flow map from it."""
    method = build.instantiate(config.method, config.trust, Method)
    run = load_run(config, config.device)

    def conditions(n: int) -> Condition:
        return labels_of_data(run, config, n) if config.conditional else None

    teacher = Teacher(run, guided(run, config), conditions, config.seed, config.again, shows_progress(), config.trust)
    source = {"weights": config.weights, "guidance": plain(config.guidance), "conditional": config.conditional}
    rows = []
    for made in method(teacher):
        row = {"kind": "distillation", **source, "seed": config.seed, **made}
        rows.append(append_row(run.path, row, config.device))
    print_table(method.table(rows))
    shown = {"run": run.path, "guidance": describe_guidance(config)}
    paths = {row["file"]: run.path / row["file"] for row in rows} | {"metrics": run.path / METRICS}
    print_rows({**{name: text for name, text in shown.items() if text}, **paths})
    return {"run": run.path, "rows": rows, "paths": paths}
