"""Checks of arguments against the annotations of the functions and classes that take them.

An annotation says what an argument must be: `int`, `float` (finite), `bool`, `str`, `None`, `Literal`, sequences,
unions, and `Annotated` with a `Constraint`, such as a range. A bool is not a number, and 1.5 is not an integer. Only
plain values are checked, those that a configuration can hold; all other objects match.
"""

import collections.abc
import functools
import inspect
import math
import operator
import os
import reprlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

PLAIN = (bool, int, float, complex, str, bytes, list, tuple, dict, type(None))
NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
T = TypeVar("T")


class Constraint:
    """A condition on a value, given in `Annotated` beside the type."""

    def matches(self, value: Any, kind: Any) -> bool:
        """Return whether a plain value matches the annotation `kind` and meets the condition."""
        raise NotImplementedError

    def describe(self, kind: str) -> str:
        """Return the values that meet the condition, in words; `kind` describes their type."""
        raise NotImplementedError


@dataclass(frozen=True)
class Range(Constraint):
    """Numbers from `low` to `high`; `is_open` excludes these two, and `is_even` allows only even numbers."""

    low: float
    high: float = math.inf
    is_open: bool = False
    is_even: bool = False

    def matches(self, value: Any, kind: Any) -> bool:
        if not matches(value, kind):
            return False
        is_inside = self.low < value < self.high if self.is_open else self.low <= value <= self.high
        return is_inside and (not self.is_even or value % 2 == 0)

    def describe(self, kind: str) -> str:
        limits = [f"{'>' if self.is_open else '>='} {self.low:,}"]
        limits += [f"{'<' if self.is_open else '<='} {self.high:,}"] if self.high < math.inf else []
        return f"{kind} {' and '.join(limits)}{', even' if self.is_even else ''}"


@dataclass(frozen=True)
class Infinite(Constraint):
    """Numbers >= `low`, infinity included."""

    low: float = -math.inf

    def matches(self, value: Any, kind: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= self.low

    def describe(self, kind: str) -> str:
        return f"a number >= {self.low:g}, also inf" if self.low > -math.inf else "a number, also inf"


@dataclass(frozen=True)
class Distinct(Constraint):
    """Sequences of at least `least` entries, without repetitions."""

    least: int = 0

    def matches(self, value: Any, kind: Any) -> bool:
        if not matches(value, kind) or value is None:
            return matches(value, kind)
        return len(value) >= self.least and all(entry not in value[:i] for i, entry in enumerate(value))

    def describe(self, kind: str) -> str:
        return f"{kind}, {'not empty, ' if self.least else ''}without repetitions"


@dataclass(frozen=True)
class Named(Constraint):
    """All values except the empty text; an error message says that `name`, such as "a directory", is expected."""

    name: str

    def matches(self, value: Any, kind: Any) -> bool:
        return matches(value, kind) and value != ""

    def describe(self, kind: str) -> str:
        return self.name


MOST = 10**6  # largest number of things that are kept in a list or computed one after the other
Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Few = Annotated[int, Range(1, MOST)]
FewOrZero = Annotated[int, Range(0, MOST)]
EvenCount = Annotated[int, Range(2, MOST, is_even=True)]
Layers = Annotated[int, Range(0, 10_000)]
Width = Annotated[int, Range(1, 2**16)]
Levels = Annotated[int, Range(2, 2**32)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Seed32 = Annotated[int, Range(0, 2**32 - 1)]  # the seeds that NumPy's RandomState accepts
Positive = Annotated[float, Range(0, is_open=True)]
NonNegative = Annotated[float, Range(0)]
Extended = Annotated[float, Infinite()]
Share = Annotated[float, Range(0, 1)]
Level = Annotated[float, Range(0, 1, is_open=True)]


class WrongType(TypeError, ValueError):
    """A value is of another type than its annotation; a value out of range raises a plain ValueError."""


def check(name: str, value: Any, annotation: Any) -> None:
    """Check a plain value against an annotation.

    Raises:
        ValueError: the value does not match; `WrongType` if its type does not. The message has the name, the values
            that match, and the value.
    """
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check(f"{name}[{i}]", item, item_annotation(annotation))
    if not matches(value, annotation):
        is_whole = isinstance(value, float) and value.is_integer() and matches(int(value), annotation)
        hint = f": write {int(value)}" if is_whole else ""
        number = 0.0 if isinstance(value, float) else value  # NaN and infinity are numbers
        error = ValueError if matches(number, _unconstrained(annotation)) else WrongType
        raise error(f"{name} must be {describe(annotation)}; got {shown(value)}{hint}")


def _unconstrained(annotation: Any) -> Any:
    """Return an annotation without the constraints of `Annotated`."""
    kind, options = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _unconstrained(options[0])
    if kind in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_unconstrained, options))
    return annotation


def check_memory(name: str, needed: float) -> None:
    """Raise ValueError if `name` needs more bytes than the machine has."""
    if needed > (available := memory()):
        raise ValueError(
            f"{name} would need {needed:.3g} bytes, and this machine has {available:.3g}: choose smaller sizes"
        )


def memory() -> float:
    """Return the bytes of memory of this machine; infinity if the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def checked(kind: type[T]) -> type[T]:
    """Class decorator: the constructor checks its arguments against their annotations, see `check`."""
    construct: Callable[..., None] = kind.__init__
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        annotations = annotations_of(construct)
        for name, value in _bound(signature, self, *args, **kwargs).items():
            check(name, value, annotations.get(name, Any))
        construct(self, *args, **kwargs)

    kind.__init__ = constructor  # type: ignore[method-assign]
    return kind


def _bound(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError:  # the function itself says which argument is missing or unknown
        return {}


@functools.cache
def annotations_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of the arguments of a function or a class, or of the keys of a TypedDict, by name.

    `**options: Annotated[Any, f, g]` stands for the arguments of f and g.
    """
    function: Any = target.__init__ if isinstance(target, type) and not is_typeddict(target) else target  # type: ignore[misc]
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # no annotations, or names that exist for type checkers only
        return {}
    return {**keys_of(hints.get(options_name(target) or "")), **hints}


def options_name(target: Callable[..., Any]) -> str | None:
    """Return the name of `**options` in the signature of a function or a class; None if it has none."""
    if is_typeddict(target):
        return None
    arguments = inspect.signature(target).parameters.values()
    return next((argument.name for argument in arguments if argument.kind is argument.VAR_KEYWORD), None)


def matches(value: Any, annotation: Any) -> bool:
    """Return whether a plain value (see the module docstring) matches an annotation; True for all other values."""
    if not isinstance(value, PLAIN) or annotation is Any or isinstance(annotation, TypeVar):
        return True
    kind, options = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        constraints = [option for option in options[1:] if isinstance(option, Constraint)]
        return all(c.matches(value, options[0]) for c in constraints) if constraints else matches(value, options[0])
    if kind in (Union, types.UnionType):
        return any(matches(value, option) for option in options)
    if kind is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if value is None or kind is None:
        return kind in (None, type(None), object) and value is None
    if isinstance(value, bool) or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return kind in (bool, object)
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    if isinstance(value, (list, tuple)) and is_sequence(kind):
        if kind is tuple and options and options[-1] is not Ellipsis:
            return len(value) == len(options) and all(map(matches, value, options))
        return not options or all(matches(item, options[0]) for item in value)
    if isinstance(value, dict):
        items = options[1] if len(options) == 2 else Any
        return is_typeddict(kind) or (issubclass(dict, kind) and all(matches(item, items) for item in value.values()))
    return isinstance(value, kind) and not is_sequence(kind)


def is_sequence(kind: Any) -> bool:
    """Return whether a list matches the annotation `kind`, given without parameters: list, tuple, Sequence, ..."""
    return kind in (list, tuple) or (getattr(kind, "__module__", "") == "collections.abc" and issubclass(list, kind))


def item_annotation(annotation: Any) -> Any:
    """Return the annotation of a list's items, such as int for list[int]; Any if `annotation` does not say."""
    kind, options = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return item_annotation(options[0])
    if kind in (Union, types.UnionType):
        return next((item_annotation(option) for option in options if is_sequence(get_origin(option) or option)), Any)
    return object if kind is object else options[0] if options and is_sequence(kind) else Any


def keys_of(annotation: Any) -> dict[str, Any]:
    """Return the annotations of the keys of a mapping, by name.

    The mapping is annotated by a TypedDict, or as `Annotated[dict, f, g]`: its keys are then the arguments of f and g.
    """
    if is_typeddict(annotation):
        return annotations_of(annotation)
    first, *others = get_args(annotation) or [None]
    if get_origin(annotation) is Annotated:
        sources = [keys_of(first), *(annotations_of(option) for option in others if callable(option))]
    else:
        sources = [keys_of(option) for option in get_args(annotation)]
    return {name: key for source in reversed(sources) for name, key in source.items() if name != "return"}


def describe(annotation: Any) -> str:
    """Return the values that match an annotation, in words."""
    kind, options = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        constraints = [option for option in options[1:] if isinstance(option, Constraint)]
        return functools.reduce(lambda text, constraint: constraint.describe(text), constraints, describe(options[0]))
    if kind in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, options)))
    if kind is Literal:
        return f"one of {', '.join(map(str, options))}"
    if kind is None or kind in NAMES:
        return NAMES[kind or type(None)]
    if is_sequence(kind):
        if kind is tuple and options and options[-1] is not Ellipsis:
            return f"a list [{', '.join(map(describe, options))}]"
        return f"a list [...] ({describe(options[0])})" if options and options[0] is not Any else "a list [...]"
    if is_typeddict(kind) or kind in (dict, collections.abc.Mapping):
        return "a mapping of keys to values"
    return "a function" if _is_callable(kind) else f"a {getattr(kind, '__name__', kind)} (_target_: ...)"


def shown(value: Any) -> str:
    """Return a value as text for a message, shortened; null, true and false are written as in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = reprlib.Repr()
    short.maxlist, short.maxstring, short.maxother, short.maxlong = 8, 80, 80, 40
    return short.repr(value)


def fits(product: Any, role: Any) -> bool:
    """Return whether objects of the class `product` match the annotation `role`.

    An object matches its base classes. It matches a protocol if it has the methods of the protocol, and `Callable` if
    it can be called, in both cases with the same number of arguments.
    """
    kind, options = get_origin(role) or role, get_args(role)
    if kind is Annotated:
        return fits(product, options[0])
    if kind in (Union, types.UnionType):
        return any(fits(product, option) for option in options)
    if kind is Any or isinstance(kind, TypeVar) or product is Any:
        return True
    if _is_callable(kind):
        return _accepts(product, "__call__", None if not options or options[0] is Ellipsis else len(options[0]))
    if not isinstance(kind, type) or not isinstance(product, type):
        return False
    if getattr(kind, "_is_protocol", False):
        methods = {
            name: method for base in kind.__mro__ for name, method in vars(base).items() if _is_of_protocol(base)
        }
        required = {name: method for name, method in methods.items() if inspect.isfunction(method) and _is_public(name)}
        return all(_accepts(product, name, len(inspect.signature(m).parameters) - 1) for name, m in required.items())
    return issubclass(product, kind)


def fits_call(product: Any, role: Any) -> bool:
    """Return whether functions that return objects of the class `product` match the annotation `role`."""
    kind, options = get_origin(role) or role, get_args(role)
    if kind in (Union, types.UnionType, Annotated):
        return any(fits_call(product, option) for option in options)
    return kind is object or (bool(options) and _is_callable(kind) and fits(product, options[-1]))


def _is_callable(kind: Any) -> bool:
    return kind is collections.abc.Callable


def _is_of_protocol(base: type) -> bool:
    return getattr(base, "_is_protocol", False) and base.__module__ != "typing"


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__call__"


def _accepts(product: Any, name: str, count: int | None) -> bool:
    """Return whether objects of the class `product` have a method `name` with `count` arguments (None: any number)."""
    defined = any(name in vars(base) for base in getattr(product, "__mro__", ()))
    method = getattr(product, "forward" if name == "__call__" and hasattr(product, "forward") else name, None)
    if not defined or count is None or not callable(method):
        return defined
    try:
        inspect.signature(method).bind(*range(count + 1))
    except TypeError:
        return False
    except ValueError:  # a method without a signature
        return True
    return True
