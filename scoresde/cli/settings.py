"""The settings of each verb and their types: one TypedDict a verb, whose keys are those of its YAML file.

`cli.keys` checks a configuration against them before the verb begins. A setting that describes an object has the type
of that object, and its arguments have the types that the object's constructor declares, see `arguments`.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypedDict

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from scoresde.arguments import (
    MOST,
    Count,
    CountOrZero,
    Distinct,
    EvenCount,
    Few,
    Level,
    Named,
    Positive,
    Range,
    Seed,
    Share,
    Width,
)
from scoresde.dequantization import Dequantization
from scoresde.evaluation.adversarial_distillation import AdversarialFlowMap
from scoresde.evaluation.dataset_likelihood import Budget, evaluate_likelihood
from scoresde.evaluation.distillation import LikelihoodSolverDistillation, SolverDistillation
from scoresde.evaluation.flow_map_distillation import FlowMapDistillation
from scoresde.flowmaps import DenoisingGenerator, FlowMap
from scoresde.inverse import Measured, Operator, RePaint, Replacement, SizedOperator, TwistedParticles
from scoresde.inverse.spectral import SpectralSampler
from scoresde.losses import Objective
from scoresde.metrics.features import FeatureSpace
from scoresde.pipelines import Autoencoder
from scoresde.predictions import Prediction
from scoresde.protocols import CaptionEncoder, Transform
from scoresde.samplers import Sampler
from scoresde.sdes import SDE
from scoresde.training.condition_dropout import Dropout
from scoresde.training.trainer import Trainer
from scoresde.training.validation import HeldOut
from scoresde.wrappers import ModelWrapper

Directory = Annotated[str | int, Named("a directory")]  # a name such as 7 is read as an integer
File = Annotated[str, Named("a path, in quotes if it is a number")]
Runs = Directory | Annotated[Sequence[Directory], Distinct(least=2)]  # one, or those of a cascade
Augmentation = Share | Sequence[Share]
Names = Annotated[Sequence[str], Distinct(least=1)]
Split = Literal["train", "validation", "test"]
Weights = str | float
Condition = int | float | str | list | dict | None
OperatorSettings = Operator | SizedOperator
Method = SolverDistillation | LikelihoodSolverDistillation | FlowMapDistillation | AdversarialFlowMap  # of `distill`
PosteriorSettings = Measured | Replacement | RePaint | SpectralSampler | TwistedParticles


class Shared(TypedDict):
    device: str
    seed: Seed
    trust: Sequence[str]


class Maps(TypedDict):
    transform: Transform | None
    dequantization: Dequantization | None


class DataSettings(Maps):
    shape: Sequence[Count] | None
    range: tuple[float, float] | None
    sigma_data: Positive
    text: CaptionEncoder | None
    training: Maps | None
    train: Dataset
    validation: Dataset | None
    test: Dataset | None


class Conditioning(TypedDict):
    dropout: Dropout


class Parts(Shared):
    """The settings that `scoresde train` and `scoresde data` share: those of a training run, without its directory."""

    sde: SDE
    prediction: Prediction
    network: nn.Module
    data: DataSettings
    loss: Objective
    sampler: Sampler
    optimizer: Callable[[Any], Optimizer]
    trainer: Trainer
    condition: Conditioning
    init_from: Directory | None
    experiment: str | None
    name: str | int
    learned_variance: bool
    classifier: bool
    contrastive: bool
    flow_map: Annotated[dict, FlowMap]
    generator: Annotated[dict, DenoisingGenerator]
    autoencoder: Annotated[dict, Autoencoder]


class Train(Parts):
    run: Directory
    held_out: Annotated[dict, HeldOut]


class Sample(Shared):
    cond: Condition
    guidance: ModelWrapper | None
    sampler: Sampler
    run: Runs
    augmentation: Augmentation
    n: Count | None
    out: File | None
    weights: Weights
    batch_size: Count
    threshold: ModelWrapper | None


class Surrogate(TypedDict):
    surrogate: Directory | None  # in place of the argument of `evaluate_likelihood`, the run


class NewData(TypedDict):
    path: File | None
    labels: str | int | Sequence[str | int] | None


class Likelihood(Shared):
    guidance: ModelWrapper | None
    likelihood: Annotated[dict, Surrogate, evaluate_likelihood]
    weights: Weights
    dequantization: str | None
    conditional: bool
    budget: Budget


class Bits(Likelihood):
    run: Runs
    split: Split | None
    data: NewData
    augmentation: Augmentation


class Evaluate(Likelihood):
    run: Directory
    split: Split
    sampler: Sampler
    features: FeatureSpace
    n: Count | None
    batch_size: Count
    threshold: ModelWrapper | None
    samples: File | None
    metrics: Names | None
    floors: Annotated[Sequence[str], Distinct()] | None
    reference: File | None
    statistics: Directory | None
    resamples: Few
    level: Level
    bpd: bool


class Restore(Shared):
    operator: OperatorSettings
    posterior: PosteriorSettings
    sampler: Sampler
    run: Directory
    n: Annotated[int, Range(2, MOST)]
    image: File | None
    split: Split
    index: CountOrZero | None
    measurement: File | None
    noise_seed: Seed
    level: Level
    tolerance: Positive | None
    particles: Annotated[int, Range(2, MOST)]
    weights: Weights
    batch_size: Count
    cond: Condition


class Scores(Shared):
    guidance: ModelWrapper | None
    likelihood: Annotated[dict, Surrogate, evaluate_likelihood]
    run: Directory
    split: Literal["train", "validation", "test", "all"] | None
    data: NewData
    id: str | int | None
    out: File | None
    weights: Weights
    dequantization: str | None
    conditional: bool


class BoundSettings(TypedDict):
    draws: EvenCount
    rounds: Few
    confidence: Positive


class Classify(Shared):
    run: Directory
    split: Split
    weights: Weights
    condition: str | None
    method: Literal["flow", "bound"]
    prior: Literal["frequencies", "uniform"]
    dequantization: str | None
    likelihood: Annotated[dict, evaluate_likelihood]
    bins: Few
    calibrate: Split | None
    bound: BoundSettings


class Compare(Shared):
    sde: SDE
    guidance: ModelWrapper | None
    features: FeatureSpace
    run: Directory
    samplers: Names
    nfe: Annotated[Sequence[Few], Distinct(least=1)]
    metrics: Names | None
    split: Split
    weights: Weights
    n: Count | None
    batch_size: Count
    repeats: Few
    resamples: Few
    level: Level


class Dequantize(Shared):
    optimizer: Callable[[Any], Optimizer]
    run: Directory
    weights: Weights
    layers: Few
    width: Width
    steps: Few
    batch_size: Count
    clip: Positive
    draws: EvenCount


class Distill(Shared):
    method: Method
    guidance: ModelWrapper | None
    run: Directory
    weights: Weights
    nfe: Annotated[Sequence[Few], Distinct(least=1)]
    split: Split
    conditional: bool
    again: bool


class Convert(Shared):
    data: DataSettings | None
    source: str
    path: File
    config: File | None
    run: Directory | None


class Examine(Parts):
    """The settings of `scoresde data`."""

    limit: Count | None
    split: Split
    n: Count | None
    out: File | None


class Report(Shared):
    run: Directory
    weights: Weights
    out: File | None
    film: bool
    film_samples: Few | None
    film_steps: Few | None
    film_frames: Few


SETTINGS: dict[str, Any] = {
    "train": Train,
    "sample": Sample,
    "restore": Restore,
    "bpd": Bits,
    "evaluate": Evaluate,
    "compare": Compare,
    "score": Scores,
    "classify": Classify,
    "dequantize": Dequantize,
    "distill": Distill,
    "convert": Convert,
    "data": Examine,
    "report": Report,
}
