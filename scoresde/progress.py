"""Progress bars: how far, how fast, how long yet; on stderr, and gone at the end."""

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
    """The items, counted in a bar as they are taken; or without items a bar to update.

    Args:
        items: what is counted.
        title: what is done, in a word or two.
        unit: of what is counted.
        shown: False for none at all.
        total: how many there will be, where the items cannot tell.
        initial: how many were done before.
    """
    options = {"total": total, "initial": initial, "unit": unit, "dynamic_ncols": True}
    return tqdm(items, desc=title, leave=False, disable=not shown, **options)
