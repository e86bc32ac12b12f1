r"""Two stages over embeddings: text to image embedding, and image embedding to image (unCLIP, 2204.06125).

A contrastive model gives the embedding z of an image x and that of a text c. Two diffusions are trained on them:

    prior      p(z | c), over vectors, given the embedding of the text
    decoder    p(x | z), over images, given the embedding of an image

and, because z is a function of x, p(x | c) = \int p(x | z) p(z | c) dz: draw z, then x (section 2). Given the embedding
of an image, the decoder alone draws variations of this image (section 3.1). Given spherical interpolations of two
embeddings, it draws images between two others (section 3.2). The scale of classifier-free guidance is chosen for each
stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scoresde.configured import Configured
from scoresde.contrastive import ContrastiveModel
from scoresde.dequantization import DataMap
from scoresde.editing import slerp
from scoresde.guidance import ClassifierFree
from scoresde.protocols import CaptionEncoder, Model
from scoresde.random_stream import RandomStream
from scoresde.result_table import Result, cost, counted, range_of, states
from scoresde.samplers import AngularAdams, PredictorCorrector, Sampler
from scoresde.tensors import check_instance, floating, send

STEPS = 20  # of the default sampler


class Embedding(Protocol):
    """Embeddings (B, E) of data and of conditions in one space, such as an `Embedder`."""

    def states(self, data: Tensor) -> Tensor:
        """Return the embeddings of data (B, *)."""

    def conditions(self, cond: Any) -> Tensor:
        """Return the embeddings of conditions with leading dimension B."""

    def project(self, vectors: Tensor) -> Tensor:
        """Return the possible embeddings that are nearest to vectors (B, E)."""


class StageRun(Protocol):
    """A trained diffusion, such as the `Run` that `ss.load` returns; `config.data.shape` is the shape of one sample."""

    model: Any
    config: Any

    @property
    def data_map(self) -> DataMap: ...


@dataclass
class Embedder:
    """Embeddings of a contrastive model, of mean square 1: unit vectors times the root of their length.

    Args:
        model: the contrastive model, in eval mode.
        data_map: maps data to the states that the model was trained on.
        text: maps captions to conditions; None if the model was not trained on captions.
    """

    model: ContrastiveModel
    data_map: DataMap
    text: CaptionEncoder | None = None

    @torch.no_grad()
    def states(self, data: Tensor) -> Tensor:
        """Return the embeddings (B, E) of data (B, *). A grey level k stands for its interval [k, k + 1)."""
        values = floating(data) if self.data_map.dequantization is None else floating(data).floor() + 0.5
        where = next(self.model.parameters(), values).device
        return self._scaled(self.model.embed(send(self.data_map.transform(values), where)))

    @torch.no_grad()
    def conditions(self, cond: Any) -> Tensor:
        """Return the embeddings (B, E) of conditions with leading dimension B, of a caption or of a list of captions.

        Warns:
            UserWarning: a caption has words that the training captions lack.

        Raises:
            ValueError: the model was not trained on captions, or a caption has no known word.
        """
        captions = [cond] if isinstance(cond, str) else cond
        if isinstance(captions, (list, tuple)) and all(isinstance(caption, str) for caption in captions):
            if self.text is None:
                raise ValueError(
                    f"captions need a model that was trained on captions; got {captions[:1]}: pass a condition"
                )
            self.text.check(captions)
            cond = self.text(captions)
        return self._scaled(self.model.embed_condition(cond))

    def project(self, vectors: Tensor) -> Tensor:
        """Return vectors (B, E) of the same directions and of mean square 1."""
        return self._scaled(torch.nn.functional.normalize(vectors, dim=1))

    @staticmethod
    def _scaled(unit: Tensor) -> Tensor:
        return unit * unit.shape[1] ** 0.5


@dataclass(repr=False)
class EmbeddingSamples(Result):
    """Samples x (B, *) in data units, the embeddings (B, E) they were decoded from, and the evaluations of networks."""

    x: Tensor
    embeddings: Tensor
    nfe: int

    def heading(self) -> str:
        return f"EmbeddingSamples: {counted(len(self.x), 'sample')}"

    def rows(self) -> dict[str, str]:
        return {"states": states(self.x), "range": range_of(self.x), "evaluations": cost(self.nfe, 0)}


class UnCLIP(Configured):
    """A prior of embeddings and a decoder: samples given a condition, variations and interpolations.

    Args:
        embedder: the embeddings, such as `ss.load_embedder` returns.
        prior: the run of p(embedding | embedding of the condition), its condition "vector".
        decoder: the run of p(x | embedding), its condition "vector".
        sampler: the sampler of the decoder; default: `AngularAdams` with 20 steps.
        prior_sampler: the sampler of the prior; default: the same.

    Raises:
        TypeError: an argument is not of its type.
    """

    def __init__(
        self,
        embedder: Embedding,
        prior: StageRun,
        decoder: StageRun,
        sampler: Sampler | None = None,
        prior_sampler: Sampler | None = None,
    ):
        check_instance("embedder", embedder, "states", "conditions", "project")
        for name, stage in (("prior", prior), ("decoder", decoder)):
            if missing := [part for part in ("model", "data_map", "config") if not hasattr(stage, part)]:
                raise TypeError(
                    f"{name} must be a run with {' and '.join(missing)}; got {type(stage).__name__}: pass ss.load(path)"
                )
        default = PredictorCorrector(AngularAdams(), steps=STEPS, denoise_final=True)
        self.embedder, self.prior, self.decoder = embedder, prior, decoder
        self.sampler, self.prior_sampler = sampler or default, prior_sampler or default

    def __call__(
        self, cond: Any, seeds: Sequence[int], scale: float = 0.0, prior_scale: float = 0.0
    ) -> EmbeddingSamples:
        """Draw an embedding given the condition, and a sample given the embedding, for each seed.

        Args:
            cond: captions, or a condition that the embedder accepts, of leading dimension B, the number of seeds, or
                1 for all.
            seeds: one seed per sample; a sample does not depend on the others.
            scale, prior_scale: scales of the classifier-free guidance of the decoder and of the prior, see
                `guidance.ClassifierFree`. 0 is the model itself; others need training with condition dropout.

        Raises:
            ValueError: the numbers of conditions and seeds differ, see also `Sampler`.
        """
        first, second = _stages(seeds)
        embeddings, nfe = self.sample_prior(cond, first, prior_scale)
        samples = self.decode(self.embedder.project(embeddings), second, scale)
        return EmbeddingSamples(samples.x, samples.embeddings, samples.nfe + nfe)

    def sample_prior(self, cond: Any, seeds: Sequence[int], scale: float = 0.0) -> tuple[Tensor, int]:
        """Draw from the prior given a condition: vectors (B, E), and the evaluations of the network.

        A call of the pipeline projects them to embeddings, because guidance makes them longer than those of data.
        """
        vectors = self.embedder.conditions(cond)
        _check_count(vectors, seeds, "conditions")
        drawn, nfe = _draw(self.prior, self.prior_sampler, vectors, seeds, scale)
        return drawn.float(), nfe

    def decode(self, embeddings: Tensor, seeds: Sequence[int], scale: float = 0.0) -> EmbeddingSamples:
        """Draw a sample given each embedding (B, E), or given one (1, E) for every seed."""
        _check_count(embeddings, seeds, "embeddings")
        x, nfe = _draw(self.decoder, self.sampler, embeddings, seeds, scale)
        return EmbeddingSamples(x, embeddings.expand(len(seeds), -1), nfe)

    def variations(self, data: Tensor, seeds: Sequence[int], scale: float = 0.0) -> EmbeddingSamples:
        """Draw samples given the embeddings of data (B, *), or of one (1, *) for all seeds (2204.06125, sec. 3.1)."""
        return self.decode(self.embedder.states(data), _stages(seeds)[1], scale)

    def interpolate(
        self, first: Tensor, second: Tensor, weights: Sequence[float], seeds: Sequence[int], scale: float = 0.0
    ) -> EmbeddingSamples:
        """Draw samples given embeddings between those of data first and second (2204.06125, section 3.2).

        The embeddings are spherical interpolations, see `editing.slerp`. All weights have the same seeds.

        Args:
            first, second: data (B, *).
            weights: K numbers; 0 gives variations of `first`, 1 of `second`.
            seeds: B seeds.
            scale: scale of the guidance of the decoder.

        Returns:
            `x` (K, B, *) and `embeddings` (K, B, E).
        """
        if not len(weights):
            raise ValueError("weights must hold at least one number from first (0) to second (1); got none")
        start, end = self.embedder.states(first), self.embedder.states(second)
        _check_count(start, seeds, "data", shared=False)
        between = torch.cat([slerp(start, end, weight) for weight in weights])
        samples = self.decode(between, _stages(seeds)[1] * len(weights), scale)
        x, embeddings = (part.unflatten(0, (len(weights), len(seeds))) for part in (samples.x, samples.embeddings))
        return EmbeddingSamples(x, embeddings, samples.nfe)


def _draw(stage: StageRun, sampler: Sampler, vectors: Tensor, seeds: Sequence[int], scale: float) -> tuple[Tensor, int]:
    """Return samples of a stage in data units given vectors (B, E) or (1, E), and the evaluations of its network."""
    model: Model = ClassifierFree(stage.model, {"vector": vectors}, scale)
    result = sampler(model, shape=(len(seeds), *stage.config.data.shape), seeds=seeds)
    return stage.data_map.inverse(result.x), result.nfe


def _stages(seeds: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return independent seeds of the prior and of the decoder."""
    stream = RandomStream(seeds=seeds)
    return stream.seeds(len(seeds)), stream.seeds(len(seeds))


def _check_count(values: Tensor, seeds: Sequence[int], name: str, shared: bool = True) -> None:
    """Raise ValueError unless there are as many values as seeds, or one for all if `shared`."""
    if len(values) != len(seeds) and not (shared and len(values) == 1):
        raise ValueError(f"expected {len(seeds)} {name}, one for each seed; got {len(values)}")
