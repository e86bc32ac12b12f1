"""Fine-tuning: a training that starts from the weights of another run.

A network may have conditions that the other network lacks: an image, labels or a vector
(`networks.condition_embeddings`). Their weights start at zero, so that the model at step 0 is the other model, for any
new conditions (GLIDE fine-tunes for inpainting in this way, 2112.10741, section 2.4). In a network with
magnitude-preserving layers, whose embeddings have a fixed magnitude, only an image can be added in this way.
"""

import torch
from torch import nn

from scoresde.networks.condition_embeddings import ConditionEmbedding, ImageCondition
from scoresde.networks.magnitude_layers import MagnitudeWeight
from scoresde.training.checkpoint import difference

CONDITIONS = (ConditionEmbedding, ImageCondition)


@torch.no_grad()
def start_from(model: nn.Module, other: nn.Module) -> list[str]:
    """Copy the weights and buffers of another model, and set those of conditions that it lacks to zero.

    Returns:
        The names of the tensors that the other model lacks.

    Raises:
        ValueError: the models differ in something else, or new conditions have magnitude-preserving embeddings; nothing
            is copied then.
    """
    own, stored = model.state_dict(), other.state_dict()
    owners = [name for name, module in model.named_modules() if isinstance(module, CONDITIONS)]
    new = [name for name in own if name not in stored and any(name.startswith(f"{owner}.") for owner in owners)]
    modules = dict(model.named_modules())
    if fixed := [name for name in new if isinstance(modules[name.rpartition(".")[0]], MagnitudeWeight)]:
        raise ValueError(
            "the conditions of a network with magnitude-preserving layers must be those of the network to start from, "
            f"as their embeddings cannot start at zero; got {fixed[0]}, which is new: leave it out, or train from the "
            "beginning"
        )
    state = {**stored, **{name: torch.zeros_like(own[name]) for name in new}}
    if text := difference(own, state):
        raise ValueError(
            f"a training can start from a model that differs in its conditions only: {text}; use the network, the path "
            "and the prediction of that run"
        )
    model.load_state_dict(state)
    return new
