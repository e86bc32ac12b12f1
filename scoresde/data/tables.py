"""Tables of numbers in text files: one sample per row, in cells separated by commas, semicolons, tabs, bars or spaces.

Where the file leaves a choice open (a header, the decimal sign, missing cells), an argument decides; no default could
change numbers silently. `table_cells` reads the cells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from scoresde.arguments import Distinct, Seed32, Share, checked
from scoresde.data.items import Items, check_choice, join_labels, listed, split_indices
from scoresde.data.table_cells import NUMBERS, Cells


@checked
class Table(Items):
    """The rows of a table as float64 vectors (D,), in the table's own units.

    Every cell of the chosen columns must be a number: a density model needs complete samples. The other columns may
    hold anything. Spaces around a cell do not count. A cell in double quotes may hold the delimiter, but not the end of
    a line. Rows without any content are skipped.

    Args:
        path: path of the file, in UTF-8, plain or compressed by gzip.
        split: "train", "validation", "test" or "all", see `split_indices`.
        columns: names in the header or numbers from 0, in the order of the vector, each at most once and without the
            labels; default: all but the labels.
        labels: column of the classes; items are then (state, label), where the label is an int64 tensor (). Several
            columns give a dict of labels by the names of the columns. Integers from 0 are the classes themselves, each
            written in one way only (not 1 and 01). Each text is replaced by its index in `class_names`, the sorted
            texts of the whole file.
        delimiter: one character, " " for any number of spaces or tabs; default: the one of tab, semicolon, bar, comma
            and space that splits each of the first 100 lines into the same number of cells; if several do, the one with
            the most characters in cells that are numbers.
        header: if True, the first row is a header; if False, it is a sample. None takes it as a header if it has text
            above a number. None raises an error if the file leaves this open: the row has text above text only, or its
            cells are different integers and a column below has decimals only.
        shape: expected shape (D,); None accepts any.
        validation, test: shares of the rows in these splits.
        seed: seed of the permutation; None keeps the order of the file, with the test rows at its end.
        decimal: the decimal sign, "." or ","; the other one may group thousands. None decides by the cells of the
            chosen columns.
        ids: column of the names of the rows, which may hold anything; by default not one of the columns.
        missing: "drop" leaves out rows with a missing cell in a chosen column or label; None refuses them. A cell is
            missing if it is empty, or NA, N/A, #N/A, <NA>, NaN, null, none, a point, ? or - (in upper or lower case),
            or another name of NaN in files of Excel and pandas.

    Attributes:
        names: names of the columns of a vector.
        unused: names of the other columns of the file, apart from the labels and ids.
        ids: the cells of the column `ids` as texts, one for each sample; by default the numbers of the rows in the
            file, from 0.

    Raises:
        ValueError: a cell is not a finite number or a row has another length (the message has the line and the column),
            the cells leave open whether there is a header or which decimal sign they use, a column or an argument is
            unknown, the shape is another one, there are no rows, or the split is empty.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "all",
        columns: Annotated[Sequence[str | int], Distinct()] | None = None,
        labels: str | int | Annotated[Sequence[str | int], Distinct(1)] | None = None,
        delimiter: str | None = None,
        header: bool | None = None,
        shape: Sequence[int] | None = None,
        validation: Share = 0.05,
        test: Share = 0.05,
        seed: Seed32 | None = 0,
        decimal: str | None = None,
        missing: str | None = None,
        ids: str | int | None = None,
    ):
        for name, value, choices in (("missing", missing, ("drop",)), ("decimal", decimal, NUMBERS)):
            if value is not None:
                check_choice(name, value, choices)
        cells = Cells(path, delimiter, header)
        targets = [cells.position(column) for column in listed(labels)]
        named = [cells.position(column) for column in listed(ids)]
        if columns is None:
            columns = [i for i in range(len(cells.names)) if i not in (*targets, *named)]
        chosen = [cells.position(column) for column in columns]
        if repeated := [cells.names[i] for n, i in enumerate(chosen) if i in chosen[:n]]:
            raise ValueError(
                f"columns must name each column once, as repeated columns have no density; got {repeated[0]!r} twice: "
                "leave one of them out"
            )
        if both := [i for i in targets if i in chosen]:
            raise ValueError(
                f"columns must not have a column of labels; got {cells.names[both[0]]!r} in columns and in labels: "
                "leave it out of one of them"
            )
        self.names = tuple(cells.names[i] for i in chosen)
        self.unused = [name for i, name in enumerate(cells.names) if i not in (*chosen, *targets, *named)]
        if not chosen or (shape is not None and tuple(shape) != (len(chosen),)):
            advice = f"set shape=[{len(chosen)}], or choose others" if chosen else "choose at least one"
            raise ValueError(
                f"rows of {path} must have shape {'(D,)' if shape is None else list(shape)}; got {len(chosen)} columns "
                f"({', '.join(self.names)}): {advice} with columns=[...]"
            )
        if missing is not None:
            cells.drop_missing([*chosen, *targets])
        decimal = decimal or cells.decimal(chosen)
        values = np.stack([cells.values(i, decimal) for i in chosen], axis=1)
        rows = split_indices(len(values), split, validation, test, seed, path)
        self.ids = cells.columns[named[0]].take(rows).to_pylist() if named else cells.rows[rows].tolist()
        texts = [cells.labels(i, decimal) for i in targets]
        keys = [cells.names[i] for i in targets] if isinstance(labels, (list, tuple)) else None
        classes, names = join_labels(keys, [(torch.from_numpy(numbers[rows]), text) for numbers, text in texts])
        super().__init__(torch.from_numpy(values[rows]), classes, class_names=names)
