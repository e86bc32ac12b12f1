"""The likelihood of a dataset as a table: the mean with its errors, and the conventions it rests on."""

from scoresde.evaluation.dataset_likelihood import DatasetLikelihood, Estimate


def likelihood_table(result: DatasetLikelihood, split: str) -> dict[str, str]:
    """Return a likelihood as rows to print: its mean, its errors, its conventions."""
    mean = str(Estimate(result.mean, result.stderr))
    if result.stderr is not None:
        mean += f" (standard error over {len(result.per_sample)} samples)"
    rows = {f"{split} {result.unit}": mean}
    if result.population is not None and result.monte_carlo is not None:
        rows["errors"] = f"+- {result.population:.4f} population, +- {result.monte_carlo:.4f} probes and dequantisation"
    if result.discretisation is not None:
        rows["finer solve"] = f"{result.discretisation.mean:+.4f} +- {result.discretisation.stderr or 0:.4f}"
    if result.bound is not None:
        rows["evidence bound"] = f"{result.bound} (of the reverse SDE)"
        rows |= {f"  {key}": value for key, value in result.bound_conventions.items() if key not in result.conventions}
    cost = f"{result.nfe:.4g} a sample, and {result.backward:.4g} backward passes"
    return {**rows, **result.conventions, "evaluations": cost}
