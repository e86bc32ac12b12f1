"""Long evaluations in parts that processes share, and that resume after an interruption.

A part is a function without arguments that returns JSON-able data, such as named lists of numbers. Parts do not depend
on each other, so neither the number of processes nor an interruption changes a result. Finished parts are stored in a
directory named by a hash of all settings of the evaluation. The directory is removed when the evaluation is complete.
Commands with the same settings share the directory while they run (`training.locks.shared`).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.atomic_files import replace_atomically
from scoresde.progress import progress_bar
from scoresde.protocols import Model, Transform
from scoresde.training import distributed
from scoresde.training.locks import shared
from scoresde.training.trainer import Interrupted

Numbers = dict[str, Any]
Part = Callable[[], Numbers]


def evaluate(parts: Mapping[str, Part], directory: Path, label: str, progress: bool) -> dict[str, Numbers]:
    """Return the results of all parts, in every process.

    Args:
        parts: functions by name; the names become file names. With P processes, each evaluates every P-th part.
        directory: where finished parts are stored until all are complete.
        label: title of the progress bar.
        progress: show the progress bar.

    Raises:
        Interrupted: Ctrl-C; finished parts stay stored.
    """
    own = dict(list(parts.items())[distributed.rank() :: distributed.size()])
    results: dict[str, Numbers] = {}
    with shared(directory), progress_bar(total=len(own), title=label, unit="part", shown=progress) as bar:
        try:
            for name, part in own.items():
                results[name] = _load_or_evaluate(part, directory / f"{name}.json")
                bar.update()
        except KeyboardInterrupt as stop:
            done = f"stopped after {len(results)} of {len(own)} parts"
            raise Interrupted(f"{done}; run the same command again to resume") from stop
        gathered = {name: numbers for share in distributed.gather(results) for name, numbers in share.items()}
    return {name: gathered[name] for name in parts}


def _load_or_evaluate(part: Part, path: Path) -> Numbers:
    """Return the stored result of a part, or evaluate and store it."""
    if path.is_file():
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): delete {path.parent} to evaluate again") from error
    numbers = part()
    text = json.dumps(numbers)  # float64 values are read back exactly
    replace_atomically(path, lambda file: file.write_text(text))
    return numbers


# --- hashes that identify an evaluation


def directory_for(parent: Path, settings: Any) -> Path:
    """Return the subdirectory of `parent` named by a hash of settings; `str` converts values without a JSON form."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return parent / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fingerprint(model: Model, transform: Transform, tensors: Iterable[Tensor] = ()) -> str:
    """Return a hash of a model (weights, SDE, attributes), a transform and further tensors."""
    times = torch.linspace(model.sde.t_min, model.sde.t_max, 17, dtype=torch.float64)
    path = (times, model.sde.alpha(times), model.sde.sigma(times))
    weights = model.state_dict().values() if isinstance(model, nn.Module) else ()
    hashed = hashlib.blake2b(f"{describe(model)} {transform} {model.sde.prior_std}".encode(), digest_size=16)
    for tensor in chain(weights, path, tensors):
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def describe(part: object) -> str:
    """Return JSON of an object: its class and its public attributes, recursively.

    Modules are described by attributes and children without weights, functions by name.
    """
    return json.dumps(part, default=_attributes, sort_keys=True)


def _attributes(part: object) -> object:
    if isinstance(part, Tensor):
        return part.tolist()
    attributes = {key: value for key, value in getattr(part, "__dict__", {}).items() if key[0] != "_"}
    children = dict(part.named_children()) if isinstance(part, nn.Module) else {}
    name = getattr(part, "__qualname__", type(part).__qualname__)
    return {"_type": f"{getattr(part, '__module__', '')}.{name}", **attributes, **children}
