"""The likelihood of a dataset as a table: the mean with its errors, and the conventions that affect it."""

from scoresde.evaluation.batch_likelihood import Estimate, four_decimals
from scoresde.evaluation.dataset_likelihood import DatasetLikelihood

SUMMANDS = {
    "prior": "-log p(z), flow",
    "reconstruction": "-log p(x | z)",
    "entropy": "log q(z | x)",
    "kl": "KL(q || p)",
    "change_of_variables": "change of variables",
}


def likelihood_table(result: DatasetLikelihood, split: str) -> dict[str, str]:
    """Return a likelihood as rows to print: the mean, errors, the evidence bound, conventions and the cost."""
    mean = str(Estimate(result.mean, result.stderr))
    if result.stderr is not None:
        mean += f" (standard error over {len(result.per_sample)} samples)"
    rows = {f"{split} {result.unit}": mean}
    if result.label is not None:
        rows["  of the label"] = f"{result.label}, by the class frequencies of the training data"
        rows["  of both"] = str(result.joint)
    rows |= {f"  {SUMMANDS.get(name, name)}": str(mean) for name, mean in result.summands.items()}
    if result.reconstruction is not None:
        rows["reconstruction error"] = f"{result.reconstruction:.4g} in units of the data, root mean square"
    if result.population is not None and result.monte_carlo is not None:
        parts = {"population": result.population, "probes and dequantisation": result.monte_carlo}
        rows["errors"] = ", ".join(f"+- {four_decimals(error)} {name}" for name, error in parts.items() if error)
    if result.terms:
        rows |= _budget(result)
    if result.discretisation is not None:
        rows["finer solve"] = ("" if result.discretisation.mean < 0 else "+") + str(result.discretisation)
    if result.bound is not None:
        rows["evidence bound"] = f"{result.bound} (of the reverse SDE)"
        rows |= {f"  {key}": value for key, value in result.bound_conventions.items() if key not in result.conventions}
    cost = f"{result.nfe:.4g} a sample, and {result.backward:.4g} backward passes"
    return {**rows, **result.conventions, "evaluations": cost}


def _budget(result: DatasetLikelihood) -> dict[str, str]:
    """Return the error budget of a multilevel estimate as rows to print."""
    errors = {"population": result.population, "this estimate": result.beyond}
    rows = {"errors": ", ".join(f"+- {four_decimals(error)} {name}" for name, error in errors.items() if error)}
    for term in result.terms:
        draws = f"{term['samples']} samples" + (f", {term['draws']} draws" if term["draws"] > term["samples"] else "")
        rows[f"  {term['name']}"] = f"{term['mean']:+.4f} +- {four_decimals(term['stderr'])} ({draws})"
    first = f"  {result.terms[0]['name']}"
    rows[first] += "".join(f", +- {four_decimals(error)} {name}" for name, error in result.parts.items() if error)
    rows["  bias"] = f"at most {four_decimals(result.bias or 0.0)}, from the last differences"
    return {**rows, "  each sample": f"+- {four_decimals(result.accuracy or 0.0)} in the stored values"}
