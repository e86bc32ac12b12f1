"""Objects that remember the arguments of their constructor, print them, and can be described as a configuration.

A subclass of `Configured` records each call of its constructor, whichever class defines it. `repr` then prints the call
with the arguments that differ from their defaults, so that equal settings give equal texts:

    >>> DDIM(eta=0.5)
    DDIM(eta=0.5)

`described` writes an object as nested dicts and lists with the `_target_` of each class, as in `config.yaml`;
`scoresde.build.instantiate` builds the object again. Dataclasses and `functools.partial` are described as well.
"""

import functools
import inspect
import math
import reprlib
import sys
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

PLAIN = (bool, int, float, str, type(None))
FEW = 8  # numbers of a tensor that are printed; larger ones are printed as dtype and shape
MOST = 4096  # numbers of a tensor that are written to a configuration
RECORD = "_constructed_with"
LISTED = reprlib.Repr()
LISTED.maxlist = LISTED.maxtuple = LISTED.maxdict = FEW
LISTED.maxstring, LISTED.maxother, LISTED.maxlong = 80, 80, 40


class NotDescribed(TypeError):
    """An object does not remember its arguments, so that no configuration can build it again."""


class Configured:
    """Remember the arguments of the constructor, and print them in one line.

    A subclass of `torch.nn.Module` whose bases begin with the module keeps PyTorch's `repr`, a tree of its layers.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if inspect.isfunction(construct := vars(cls).get("__init__")):
            cls.__init__ = _recording(construct)  # type: ignore[method-assign]

    def recorded_arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor, by name, without those that have their default."""
        args, kwargs = vars(self).get(RECORD, ((), {}))
        return bound(type(self).__init__, (self, *args), kwargs)

    def every_argument(self) -> dict[str, Any]:
        """Return all arguments of the constructor by name, defaults included.

        If the object has a float attribute with the name of an argument, its value is returned, as training may have
        changed it.
        """
        named = with_defaults(type(self), self.recorded_arguments()).items()
        return {name: own if isinstance(own := getattr(self, name, None), float) else value for name, value in named}

    def __repr__(self) -> str:
        return call_text(self)


def _recording(construct: types.FunctionType) -> Any:
    """Return a constructor that records its arguments, unless the constructor of a subclass has done so before."""

    @functools.wraps(construct)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            object.__getattribute__(self, RECORD)
        except AttributeError:  # the first constructor of this object; `vars` would slow down its attributes
            object.__setattr__(self, RECORD, (args, kwargs))
        construct(self, *args, **kwargs)

    return constructor


def bound(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a constructor by name, without `self` and those equal to their defaults."""
    signature = inspect.signature(function)
    found: dict[str, Any] = {}
    for name, value in list(signature.bind(*args, **kwargs).arguments.items())[1:]:
        kind, default = signature.parameters[name].kind, signature.parameters[name].default
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL or not _same(value, default):
            found[name] = value
    return found


def with_defaults(kind: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor by name, in the order of its signature, with the defaults of the others."""
    parameters = inspect.signature(kind).parameters.values()
    defaults = {part.name: part.default for part in parameters if part.default is not part.empty}
    order = dict.fromkeys(part.name for part in parameters if part.name in defaults or part.name in arguments)
    return {name: arguments.get(name, defaults.get(name)) for name in order} | arguments


def _same(value: Any, default: Any) -> bool:
    """Return whether a plain value equals a default; other values are the same only if they are the same object."""
    if isinstance(value, PLAIN) and isinstance(default, PLAIN):
        return value == default and isinstance(value, bool) == isinstance(default, bool)
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return len(value) == len(default) and all(map(_same, value, default))
    return value is default


def remembered(value: Any) -> dict[str, Any] | None:
    """Return the arguments that make an object of this library, by name; None if it does not remember them."""
    if isinstance(value, Configured):
        has_record = RECORD in vars(value) or type(value).__init__ in (object.__init__, nn.Module.__init__)
        return value.recorded_arguments() if has_record or not _takes_arguments(type(value)) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: getattr(value, field.name)
            for field in fields(value)
            if field.init and not _same(getattr(value, field.name), field.default)
        }
    return None


def _takes_arguments(kind: type) -> bool:
    return len(inspect.signature(kind.__init__).parameters) > 1  # type: ignore[misc]


# --- as text


def call_text(value: Any) -> str:
    """Return the call that makes an object as one line of text, `Name(...)` if the arguments are not known."""
    if (arguments := remembered(value)) is None:
        return f"{type(value).__name__}(...)"
    return f"{type(value).__name__}({', '.join(f'{name}={one_line(part)}' for name, part in arguments.items())})"


def one_line(value: Any) -> str:
    """Return a value as one line of text.

    Tensors of more than a few numbers are shown as dtype and shape, and an object as its `repr` if that is one line.
    """
    if isinstance(value, functools.partial):
        options = [f", {name}={one_line(part)}" for name, part in value.keywords.items()]
        return f"partial({one_line(value.func)}{''.join(options)})"
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        return _array_line(value)
    if isinstance(value, (list, tuple)) and len(value) <= FEW:
        inside = ", ".join(map(one_line, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict) and len(value) <= FEW:
        return f"{{{', '.join(f'{key!r}: {one_line(part)}' for key, part in value.items())}}}"
    if isinstance(value, (list, tuple, dict, *PLAIN)):
        return LISTED.repr(value)
    if isinstance(value, Path):
        return repr(str(value))
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__name__
    own = type(value).__repr__
    text = "" if own in (object.__repr__, nn.Module.__repr__) else repr(value)
    if text and "\n" not in text:
        return text
    return call_text(value)


def _array_line(array: Any) -> str:
    """Return the numbers of a small array, or dtype and shape of a larger one."""
    shape = tuple(array.shape)
    if math.prod(shape) > FEW or getattr(array, "is_meta", False):
        return f"<{str(array.dtype).removeprefix('torch.')} {shape}>"
    return LISTED.repr(array.tolist())


# --- as a configuration


def described(value: Any) -> Any:
    """Return a value or an object as a configuration: plain values, lists, and dicts with `_target_`.

    Raises:
        NotDescribed: an object in it does not remember its arguments, or a tensor has more than 4,096 numbers.
    """
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [described(part) for part in value]
    if isinstance(value, dict):
        return {str(key): described(part) for key, part in value.items()}
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        if math.prod(value.shape) <= MOST:
            return value.tolist()
        raise NotDescribed(f"a tensor of shape {tuple(value.shape)} is too large for a configuration")
    if isinstance(value, functools.partial) and not value.args:
        return {"_target_": target_of(value.func), "_partial_": True, **described(value.keywords)}
    if isinstance(value, (type, types.FunctionType)):
        return {"_target_": target_of(value), "_partial_": True}
    if (arguments := remembered(value)) is not None:
        return {"_target_": target_of(type(value)), **described(with_defaults(type(value), arguments))}
    raise NotDescribed(f"{full_name(value)} does not remember the arguments of its constructor")


def target_of(kind: Any) -> str:
    """Return the name of a class, or of a function that makes networks, as configurations write it.

    It is the name in the first package that exports the class.

    Raises:
        NotDescribed: the class is neither of this library nor of torch, or the function makes no networks.
    """
    parts, name = kind.__module__.split("."), kind.__name__
    if parts[0] not in ("scoresde", "torch") or not (isinstance(kind, type) or parts[:2] == ["scoresde", "networks"]):
        raise NotDescribed(f"{full_name(kind)} is not a class of this library or of torch")
    for count in range(2, len(parts) + 1):
        if getattr(sys.modules.get(".".join(parts[:count])), name, None) is kind:
            return ".".join([*parts[:count], name])
    raise NotDescribed(f"{full_name(kind)} has no public name")


def full_name(value: Any) -> str:
    """Return the module and the name of a function, or of the class of an object."""
    kind = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
