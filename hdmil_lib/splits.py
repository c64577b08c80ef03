"""Splits: the slides of the training, validation and test part of a fold, and CLAM's files of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from hdmil_lib.errors import CohortError
from hdmil_lib.storage import read_table, write_whole

_SPLIT_FILE = re.compile(r"splits_(\d+)(_bool)?\.csv$")
PARTS = ("train", "val", "test")
"""Names of the parts of a split."""


@dataclass(frozen=True)
class Split:
    """Names of the slides in the three parts of a fold."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def write_splits(splits: Sequence[Split], folder: str | Path) -> None:
    """Write `splits_<k>.csv` in CLAM's format: columns train, val, test, padded with blanks."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for k, split in enumerate(splits):
        columns = {part: pd.Series(getattr(split, part), dtype=str) for part in ("train", "val", "test")}
        text = pd.DataFrame(columns).to_csv()
        write_whole(folder / f"splits_{k}.csv", partial(Path.write_text, data=text, encoding="utf-8"))


def read_splits(folder: str | Path) -> list[Split]:
    """Read CLAM's `splits_0.csv`, `splits_1.csv`, ... in order.

    A file either lists the slides of each part in its columns train, val and test, or has one row per slide,
    named in the first column, with True in the column of its part. The latter, `splits_<k>_bool.csv`, is read
    where `splits_<k>.csv` is missing. Parts of different folds may overlap.

    Raises:
        CohortError: There are no split files, one of them is missing between others, a column is missing, or
            a slide is in two parts of a fold.
    """
    folder = Path(folder)
    numbers = sorted(
        int(found[1]) for p in folder.glob("splits_*.csv") if (found := _SPLIT_FILE.match(p.name))
    )
    if not numbers:
        raise CohortError(f"{folder}: no splits_0.csv; write splits with `write_splits`, or as CLAM does")
    absent = sorted({*range(numbers[-1] + 1)} - {*numbers})
    if absent:
        raise CohortError(
            f"{folder}: no splits_{absent[0]}.csv, but splits_{numbers[-1]}.csv; number them from 0"
        )
    splits = []
    for number in sorted({*numbers}):
        paths = folder / f"splits_{number}.csv", folder / f"splits_{number}_bool.csv"
        splits.append(_read_split(next((path for path in paths if path.is_file()), paths[0])))
    return splits


def _read_split(path: Path) -> Split:
    table = read_table(path)
    if not set(PARTS) <= set(table.columns):
        raise CohortError(f"{path}: columns are {', '.join(table.columns)}; needs train, val, test")
    if table[list(PARTS)].isin(["True", "False"]).all(axis=None):
        chosen = table[list(PARTS)] == "True"
        names = table.iloc[:, 0]
        refuse(names[chosen.sum(axis=1) > 1].tolist(), f"{path}: in two parts:", "leave one True per row")
        return Split(*(tuple(names[chosen[part]]) for part in PARTS))
    split = Split(*(_names(table[part].dropna()) for part in PARTS))
    everyone = pd.Series([*split.train, *split.val, *split.test])
    refuse(everyone[everyone.duplicated()].tolist(), f"{path}: in two parts:", "remove the repetition")
    return split


def _names(column: pd.Series) -> tuple[str, ...]:
    """Names of slides; pandas writes names that are numbers as "12.0" where the column has gaps."""
    return tuple(map(whole_number, column)) if column.str.fullmatch(r"\d+\.0").all() else tuple(column)


def whole_number(label: str) -> str:
    """A label such as "1.0", which spreadsheets make of 1, as "1"; others stay."""
    whole, point, rest = label.partition(".")
    return whole if point and whole.isdecimal() and set(rest) <= {"0"} else label


def refuse(slides: Sequence[str], what: str, remedy: str) -> None:
    """Raise a CohortError that names the first five slides, if there are any.

    Args:
        slides: Names of slides that are refused.
        what: What is wrong with them; their names follow.
        remedy: What the user can do.

    Raises:
        CohortError: There are slides.
    """
    if slides:
        names = ", ".join(map(str, slides[:5])) + (f" and {len(slides) - 5} more" if len(slides) > 5 else "")
        raise CohortError(f"{what} {names}; {remedy}")
