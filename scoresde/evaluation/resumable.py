"""Long evaluations in pieces: each done once, kept on disk until all are there, shared among processes.

A piece is a name and a function without arguments that returns what JSON can hold: named lists of numbers, say. Pieces
are independent of each other, so that neither the number of processes nor an interruption changes a result. Those
finished wait in a directory of their own; when the evaluation is complete the directory goes.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.progress import progress_bar
from scoresde.sdes import SDE
from scoresde.training import distributed
from scoresde.training.checkpoint import replace_atomically
from scoresde.training.trainer import Interrupted

Numbers = dict[str, Any]
Piece = Callable[[], Numbers]


def store(parent: Path, description: Any) -> Path:
    """The directory of the evaluation that a JSON-able description stands for."""
    text = json.dumps(description, sort_keys=True, default=str)
    return parent / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest(tensors: Iterable[Tensor], text: str) -> str:
    """What stands for the values of some tensors, and a text."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    found.update(text.encode())
    return found.hexdigest()


def path_of(sde: SDE) -> tuple[Tensor, Tensor, Tensor]:
    """What stands for a path: some times, and alpha and sigma there."""
    times = torch.linspace(sde.t_min, sde.t_max, 17, dtype=torch.float64)
    return times, sde.alpha(times), sde.sigma(times)


def evaluate(pieces: Mapping[str, Piece], directory: Path, label: str, progress: bool) -> dict[str, Numbers]:
    """The numbers of all pieces, in each process.

    Args:
        pieces: by name; the names are those of files. Each process does every size-th of them.
        directory: where those finished are kept until the end.
        label: of the progress bar.
        progress: show one.

    Raises:
        Interrupted: Ctrl-C; what is finished is kept.
    """
    mine = dict(list(pieces.items())[distributed.rank() :: distributed.size()])
    found: dict[str, Numbers] = {}
    bar = progress_bar(total=len(mine), title=label, unit="piece", shown=progress)
    with bar:
        try:
            for name, piece in mine.items():
                found[name] = _once(piece, directory / f"{name}.json")
                bar.update()
        except KeyboardInterrupt as stop:
            raise Interrupted(
                f"stopped after {len(found)} of {len(mine)} pieces; the same command goes on from there"
            ) from stop
    gathered = {name: numbers for part in distributed.gather(found) for name, numbers in part.items()}
    if distributed.rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    return {name: gathered[name] for name in pieces}


def _once(piece: Piece, path: Path) -> Numbers:
    """What the piece returns, or returned before."""
    if path.is_file():
        return json.loads(path.read_text())
    numbers = piece()
    text = json.dumps(numbers)  # Python writes float64 so that it reads back the same
    replace_atomically(path, lambda file: file.write_text(text))
    return numbers
