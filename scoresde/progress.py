"""Progress on stderr: a bar at a terminal or in a notebook, one line a minute in a log.

A bar shows the rate and the remaining time, and disappears at the end. Notebooks get a widget if `ipywidgets` is
installed, otherwise the bar of a terminal.
"""

import importlib.util
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

INTERVAL = 60.0  # seconds between two lines of a log


class Lines(tqdm):
    """A bar that writes a line every minute, for output that is not a terminal; nothing before the first minute."""

    def __init__(self, *args: Any, **options: Any):
        self.written = time.monotonic()
        super().__init__(*args, **{**options, "mininterval": INTERVAL, "maxinterval": INTERVAL, "delay": INTERVAL})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line if it is time: "training: 1,200 of 5,000 steps, 20.1 a second, 3 min left, loss=0.12"."""
        if msg is None and time.monotonic() - self.written >= INTERVAL:
            self.written = time.monotonic()
            self.fp.write(self._line() + "\n")
            self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Leave the lines where they are."""

    def close(self) -> None:
        """End without a line."""
        self.sp = None  # tqdm's printer, which would write a carriage return
        super().close()

    def moveto(self, n: int) -> None:
        """Stay in the line: a log has no cursor to move."""

    def _line(self) -> str:
        elapsed, done = self.format_dict["elapsed"], self.n - self.initial
        rate = done / elapsed if elapsed else 0.0
        units = f"{self.unit}{'es' if self.unit.endswith('ch') else 's'}"
        parts = [
            f"{self.n:,}{'' if self.total is None else f' of {self.total:,}'} {units}",
            f"{rate:.3g} a second",
        ]
        if self.total is not None and rate:
            parts.append(f"{_duration((self.total - self.n) / rate)} left")
        return f"{self.desc.removesuffix(': ')}: {', '.join([*parts, *([self.postfix] if self.postfix else [])])}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    title: str,
    unit: str = "it",
    shown: bool,
    total: int | None = None,
    initial: int = 0,
) -> Any:
    """Return a progress bar that iterates over `items`; without items, the caller advances it by `update`.

    Args:
        items: the items to iterate over.
        title: title of the bar, one or two words.
        unit: name of one item.
        shown: whether to show the bar.
        total: number of items, if `items` has no length.
        initial: number of items that were done before.
    """
    options = {"total": total, "initial": initial, "unit": unit, "dynamic_ncols": True}
    return _kind()(items, desc=title, leave=False, disable=not shown, **options)


def _kind() -> Any:
    """Return the class of bars for this process."""
    if not _is_notebook():
        return tqdm if sys.stderr.isatty() else Lines
    if importlib.util.find_spec("ipywidgets") is None:
        return tqdm
    from tqdm.notebook import tqdm as widget  # imported late: it imports ipywidgets

    return widget


def _is_notebook() -> bool:
    """Return whether the process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    current = None if shell is None else shell.get_ipython()
    return current is not None and "IPKernelApp" in current.config
