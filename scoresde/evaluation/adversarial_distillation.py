"""Adversarial distillation of a run into a flow map: a method of `scoresde distill`; see `flowmaps.adversarial`."""

from collections.abc import Mapping
from typing import Annotated, Any

from scoresde.arguments import checked, keys_of
from scoresde.evaluation.distillation import Teacher
from scoresde.evaluation.flow_map_distillation import FlowMapDistillation
from scoresde.flowmaps import AdversarialDistillation, FeatureDiscriminator
from scoresde.losses import Objective

Adversary = Annotated[dict, AdversarialDistillation, FeatureDiscriminator]


@checked
class AdversarialFlowMap(FlowMapDistillation):
    """Train a flow map from the model of a run, by an objective and a discriminator on the features of that model.

    Args:
        adversary: arguments of `AdversarialDistillation` and of `FeatureDiscriminator`, except models and objectives.
        options: arguments of `FlowMapDistillation`; `objective` is the distillation term.
    """

    def __init__(self, adversary: Adversary | None = None, **options: Annotated[Any, FlowMapDistillation]):
        super().__init__(**options)
        self.adversary: Mapping[str, Any] = adversary or {}

    def loss(self, teacher: Teacher) -> Objective:
        """Return the sum of the distillation term and the adversarial losses."""
        names = keys_of(Annotated[dict, FeatureDiscriminator])
        judged = {name: value for name, value in self.adversary.items() if name in names}
        others = {name: value for name, value in self.adversary.items() if name not in names}
        shape = list(teacher.run.config.data.shape)
        discriminator = FeatureDiscriminator(teacher.model, shape, **judged)
        return AdversarialDistillation(self.distillation(teacher), discriminator, **others)

    def configuration(self, teacher: Teacher) -> dict[str, Any]:
        """Return the configuration of the student, see `FlowMapDistillation.configuration`."""
        config = super().configuration(teacher)
        target = f"scoresde.flowmaps.{AdversarialDistillation.__name__}"
        return config | {"loss": {"_target_": target, "distillation": config["loss"], **self.adversary}}
