"""The public face of the distances between samples: every name is that of the module that has it."""

import inspect

from scoresde import metrics
from scoresde.metrics import vectors


def test_every_distance_is_there_under_its_name():
    for name in vectors.__all__:
        home = inspect.getmodule(getattr(vectors, name))
        if inspect.isclass(getattr(vectors, name)) or inspect.isfunction(getattr(vectors, name)):
            assert home.__name__.startswith("scoresde.metrics.")
            assert getattr(home, name) is getattr(vectors, name)
    assert {"energy_distance", "sliced_wasserstein", "mmd", "bootstrap"} <= set(vectors.__all__) & set(metrics.__all__)
