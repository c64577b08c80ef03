"""The figures that the paper reports in its Tables 1 to 3."""

from pathlib import Path

import pandas as pd


def _read(number: int) -> pd.DataFrame:
    path = Path(__file__).with_name("data") / f"paper_table{number}.csv"
    return pd.read_csv(path, index_col=[0, 1])


PAPER_TABLE1 = _read(1)
"""Ten-fold test scores in percent, mean (sd), and seconds per slide; indexed by cohort and method."""

PAPER_TABLE2 = _read(2)
"""Seconds per slide and stage; nan where the figure is not known."""

PAPER_TABLE3 = _read(3)
"""Ten-fold validation scores in percent, as components are added one after the other."""
