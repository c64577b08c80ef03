"""Schemas of the files of a cross-validation, which are held to types and bounds when they are read back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import ConfigDict, Field

from hdmil_lib.errors import CheckpointError, HDMILError
from hdmil_lib.models.info import Name, Text
from hdmil_lib.schema import Schema, read_schema
from hdmil_lib.system_errors import read_error, refusal

REMEDY = "delete its folder and train again"

Share = Annotated[float, Field(gt=0, le=1)]
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Size = Annotated[int, Field(ge=1, le=65_536)]
Setting = Annotated[int, Field(ge=-65_536, le=65_536)] | Number | bool | Name | None
Thresholds = Annotated[tuple[Annotated[float, Field(ge=-1, le=2)], ...], Field(min_length=1, max_length=1000)]


class _Encoder(Schema):
    name: Name
    weights_hash: Text


class _Tiles(Schema):
    tissue: Text
    min_tissue: Annotated[float, Field(ge=0, le=1)]
    tile_size: Size
    tile_mpp: Annotated[float, Field(gt=0, le=1000)]


class CrossValidationRecord(Schema):
    """Content of the `config.json` of a cross-validation."""

    n_folds: Annotated[int, Field(ge=1, le=1000)]
    seed: int
    recipe: dict[str, Any]
    splits: Text
    labels: Text
    classes: Annotated[tuple[Name, ...], Field(min_length=2, max_length=1000)]
    features: Text
    encoder: _Encoder
    cohort: Text
    tiles: _Tiles | None = None


class ModelRecord(Schema):
    """Content of a `model.json`: the arguments of `create_model`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Setting | tuple[Setting, ...]]

    name: Name
    in_dim: Size
    n_classes: Annotated[int, Field(ge=2, le=1000)]


class _CascadeSettings(Schema):
    side: Annotated[int, Field(ge=1, le=4096)]
    first: Share
    keep_ratio: Share
    n_draws: Annotated[int, Field(ge=1, le=1_000_000)]


class CascadeRecord(Schema):
    """Rules of a cascade."""

    settings: _CascadeSettings
    thresholds: Thresholds
    coarse_weight: Number
    slope: Annotated[float, Field(gt=0, le=1e6)]
    bias: Annotated[tuple[Number, ...], Field(min_length=1, max_length=1000)]
    settling: Annotated[list[Any], Field(max_length=1000)]
    screening: Literal["networks", "random"]
    judged: dict[str, Any]


class RunRecord(Schema):
    """Content of the `config.json` of one training; what `fit` wrote is compared there, whatever it is."""

    model_config = ConfigDict(extra="allow")

    settings: dict[str, Any]
    thresholds: Thresholds | None = None
    cascade: CascadeRecord | None = None


def read_cross_validation(folder: Path) -> CrossValidationRecord:
    """Read the `config.json` of a cross-validation; raises a CheckpointError."""
    return read_schema(folder / "config.json", CrossValidationRecord, REMEDY)


def read_model(folder: Path) -> dict[str, Any]:
    """Read the arguments of `create_model`; raises a CheckpointError."""
    return dict(read_schema(folder / "model.json", ModelRecord, REMEDY))


def read_run(folder: Path) -> RunRecord:
    """Read the `config.json` of one training; raises a CheckpointError."""
    return read_schema(folder / "config.json", RunRecord, REMEDY)


def read_rows(path: Path, columns: Sequence[str], **options: Any) -> pd.DataFrame:
    """Read a table of a training.

    Args:
        path: The CSV file.
        columns: Columns that it must have.
        **options: Options of `pandas.read_csv`.

    Raises:
        CheckpointError: The file is missing, cannot be read or is damaged, or lacks a column.
    """
    try:
        table = pd.read_csv(path, **options)
    except (OSError, MemoryError, ValueError, OverflowError) as error:  # errors of the parser are ValueErrors
        damage = f"unreadable ({' '.join(str(error).split())}); {REMEDY}"
        raise read_error(CheckpointError, path, error, damage) from error
    if missing := [name for name in columns if name not in table]:
        raise CheckpointError(f"{path}: lacks the column {missing[0]}; {REMEDY}")
    return table


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Within the block, settings or weights of a file that no network has become a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (HDMILError, ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        damage = f"describes no network ({' '.join(str(error).split())[:300]}); {REMEDY}"
        raise CheckpointError(f"{path}: {refusal(error) or damage}") from error
