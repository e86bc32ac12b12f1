"""Retrieval: is the partner of a query among the k most similar of N candidates?"""

from torch import Tensor

from scoresde.metrics.intervals import Interval, wilson
from scoresde.metrics.samples import refuse_nonfinite
from scoresde.tensors import check_integer


def ranks(similarities: Tensor) -> Tensor:
    """Return the rank (N,) of candidate i for query i: 1 plus the number of other candidates at least as similar.

    Args:
        similarities: (N, N), of query i and candidate j.

    Raises:
        ValueError: the similarities are not a square matrix of finite numbers.
    """
    if similarities.ndim != 2 or similarities.shape[0] != similarities.shape[1] or not len(similarities):
        raise ValueError(f"similarities must be a square matrix (N, N); got shape {tuple(similarities.shape)}")
    refuse_nonfinite(similarities, "similarities")
    return (similarities >= similarities.diagonal()[:, None]).sum(dim=1)


def retrieval(similarities: Tensor, k: int = 1, z: float = 1.96) -> Interval:
    """Return the share of queries whose partner is among the k most similar candidates (recall at k).

    Query i and candidate i are partners; by chance the share is k/N. The interval is Wilson's, which takes the queries
    as independent although they share the candidates.

    Args:
        similarities: (N, N), of query i and candidate j; candidates that are as similar as the partner rank before it.
        k: number of candidates that are retrieved.
        z: quantile of the normal distribution, 1.96 for 95%.

    Raises:
        ValueError: k is less than 1, see also `ranks`.
    """
    check_integer("k", k, least=1)
    return wilson(int((ranks(similarities) <= k).sum()), len(similarities), z)
