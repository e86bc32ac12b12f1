"""Checks of constructor arguments by their annotations: finite numbers, integers, booleans and texts.

`@checked` above a class checks the arguments of its constructor before they are used: an argument annotated `float`
must be a finite number, `int` an integer, `bool` True or False, and `str` a text; with `| None` it may be None. Ranges
are the constructor's own business, and so are arguments of other types.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_type_hints

from scoresde.tensors import check_integer, check_number

Class = TypeVar("Class", bound=type)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text; got {value!r}")


CHECKS: dict[Any, Callable[[str, object], Any]] = {
    float: check_number,
    int: check_integer,
    bool: _check_bool,
    str: _check_text,
}


def checked(cls: Class) -> Class:
    """Return the class, with a constructor that checks its arguments by their annotations; see the module.

    Raises:
        TypeError: in the constructor, an argument of another type.
        ValueError: in the constructor, a number that is NaN or infinite.
    """
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]
    signature, hints = inspect.signature(init), get_type_hints(init)
    checks = {name: kinds for name, hint in hints.items() if name != "return" and (kinds := _kinds(hint))}

    @functools.wraps(init)
    def checking(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            given = {}  # the constructor says what is missing
        for name, (check, takes_none) in checks.items():
            if name in given and not (takes_none and given[name] is None):
                check(name, given[name])
        init(self, *args, **kwargs)

    cls.__init__ = checking  # type: ignore[misc]
    return cls


def _kinds(hint: Any) -> tuple[Callable[[str, object], Any], bool] | None:
    """Return the check of an annotation, and whether it allows None; None if there is no check."""
    options = set(get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    takes_none = type(None) in options
    options -= {type(None)}
    (option,) = options if len(options) == 1 else (None,)
    return (CHECKS[option], takes_none) if option in CHECKS else None
