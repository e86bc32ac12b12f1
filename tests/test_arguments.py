"""Arguments are compared with annotations: types, ranges, sequences, roles."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import pytest
import torch
from torch import nn

from scoresde import arguments
from scoresde.arguments import Count, Distinct, EvenCount, Infinite, Level, Positive, check, check_memory, checked, fits
from scoresde.arguments import fits_call as makes
from scoresde.networks import MLP, Ends, ddpmpp
from scoresde.protocols import Transform
from scoresde.samplers import Langevin
from scoresde.solvers import Adams
from scoresde.solvers.solver import Solver
from scoresde.training import Trainer

MATCHES = [  # annotation, values that match, values that do not
    (int, [0, -3, np.int64(2)], [1.0, True, "1", None, [], math.nan]),
    (float, [0, 1.5, -2, np.float32(1)], [math.inf, math.nan, True, "1", None, [1], 10**400]),
    (bool, [True, False], [1, 0, "true", None]),
    (str, ["", "a"], [1, None, ["a"]]),
    (Count, [1, 10**12], [0, -1, 1.5, True]),
    (EvenCount, [2, 4], [0, 3, 2.0]),
    (Positive, [1e-9, 3], [0, -1, math.inf, math.nan]),
    (Annotated[float, Infinite(0)], [math.inf, 0], [math.nan, -1, "inf", True]),
    (int | None, [None, 3], [1.5, "a", []]),
    (Literal["a", 1], ["a", 1], ["b", True, 1.0, None]),
    (Sequence[int], [[], [1, 2], (3,)], ["12", [1.5], [[1]], None, {}]),
    (int | Sequence[int], [3, [3, 4]], [["a"], 1.5]),
    (tuple[float, float], [[1, 2]], [[1], [1, "a"], [1, 2, 3]]),
    (Annotated[Sequence[str], Distinct(least=1)], [["a"], ["a", "b"]], [[], ["a", "a"], "a"]),
    (dict[str, Any], [{}, {"a": 1}], [[], "a", None]),
    (nn.Module, [nn.Identity()], [1, "a", {}, None]),
    (Transform | None, [None], [0, "a", []]),
    (Callable[..., Any], [print], ["print", 3]),
    (torch.Tensor | float, [torch.zeros(2), 1.0], ["a"]),
    (Any, [1, "a", None, math.nan], []),
]


@pytest.mark.parametrize(("annotation", "right", "wrong"), MATCHES, ids=[str(i) for i in range(len(MATCHES))])
def test_values_match_annotations(annotation, right, wrong):
    for value in right:
        check("x", value, annotation)
    for value in wrong:
        with pytest.raises(ValueError, match=r"^x(\[\d\])? must be .*; got "):
            check("x", value, annotation)


@pytest.mark.parametrize(
    ("value", "annotation", "error"),
    [
        (0, Count, ValueError),
        (1.5, Count, TypeError),
        ("a", Positive, TypeError),
        (-1.0, Positive, ValueError),
        (math.nan, Positive, ValueError),
        (math.inf, float, ValueError),
        (["a", "a"], Annotated[Sequence[str], Distinct()], ValueError),
        (3, str | None, TypeError),
        (1.0, Level, ValueError),
    ],
)
def test_another_type_is_a_type_error_and_another_value_is_not(value, annotation, error):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check("x", value, annotation)
    assert isinstance(caught.value, TypeError) == (error is TypeError)


def test_messages_have_the_name_the_expectation_and_the_value():
    class Settings(TypedDict):
        a: Annotated[int, arguments.Range(0, 10)]
        b: Sequence[float] | None

    for key, value, message in (
        ("a", 11, "a must be an integer >= 0 and <= 10; got 11"),
        ("a", 3.0, "a must be an integer >= 0 and <= 10; got 3.0: write 3"),
        ("b", "x", "b must be a list [...] (a finite number) or null; got 'x'"),
        ("b", [1, None], "b[1] must be a finite number; got null"),
        ("b", False, "b must be a list [...] (a finite number) or null; got false"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            check(key, value, arguments.annotations_of(Settings)[key])
        assert str(error.value) == message


def test_a_class_fits_its_bases_and_the_protocols_whose_methods_it_has():
    assert fits(MLP, nn.Module)
    assert fits(Adams, Solver)
    assert not fits(MLP, Solver)  # its call takes three arguments, a solver's four
    assert not fits(Trainer, nn.Module | None)
    assert fits(Langevin, Callable[[Any, Any, Any, Any], Any])
    assert not fits(MLP, Callable[[Any, Any, Any, Any], Any])
    assert not fits(Ends, Callable[..., Any])
    assert makes(torch.optim.Adam, Callable[[Any], torch.optim.Optimizer])
    assert not makes(MLP, Callable[[Any], torch.optim.Optimizer] | None)


def test_options_stand_for_the_arguments_of_the_classes_that_take_them():
    known = arguments.annotations_of(ddpmpp)
    assert known["deep"] is bool
    assert known["dropout"] == arguments.Share  # of BlockStyle
    assert known["multipliers"] == Sequence[Count]  # of UNet


def test_a_checked_class_refuses_wrong_arguments_in_python():
    @checked
    class Half:
        def __init__(self, n: EvenCount, scale: Positive = 1.0):
            self.value = n * scale / 2

    assert Half(4).value == 2
    assert Half(4, scale=torch.tensor(3.0)).value == 6  # another object than plain values
    with pytest.raises(ValueError, match="n must be an integer >= 2 and <= 1,000,000, even; got 3"):
        Half(3)
    with pytest.raises(ValueError, match="scale must be a finite number > 0; got nan"):
        Half(2, math.nan)
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        Half(2, size=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup": math.nan}, "warmup must be an integer >= 0; got nan"),
        ({"seed": "abc"}, "seed must be an integer >= 0 .*; got 'abc'"),
        ({"compile": "abc"}, "compile must be true or false; got 'abc'"),
        ({"log_every": -1}, "log_every must be an integer >= 0; got -1"),
    ],
)
def test_a_trainer_refuses_them_too(wrong, message):
    with pytest.raises(ValueError, match=message):
        Trainer(torch.optim.SGD, steps=1, **wrong)


def test_a_network_refuses_them_too():
    with pytest.raises(ValueError, match="depth must be an integer >= 0 and <= 10,000; got -1"):
        MLP(2, depth=-1)


def test_what_needs_more_memory_than_there_is_names_the_bytes(monkeypatch):
    monkeypatch.setattr(arguments, "memory", lambda: 1000.0)
    check_memory("x", 1000)
    with pytest.raises(
        ValueError, match=r"x would need 1e\+03 bytes, and this machine has 1e\+03: choose smaller sizes"
    ):
        check_memory("x", 1001)
