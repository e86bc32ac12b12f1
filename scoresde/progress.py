"""Progress bars on stderr with rate and remaining time; they disappear at the end."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


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
    return tqdm(items, desc=title, leave=False, disable=not shown, **options)
