"""The table of slides in the Imaging Data Commons that `hdmil fetch` reads, from its index.

    pip install idc-index-data
    python tools/idc_table.py

Writes `hdmil_lib/public/data/idc_slides.csv`: one row per slide of paraffin-embedded primary tumor of
TCGA-LUAD, TCGA-LUSC and TCGA-BRCA, and per slide of tumor of CPTAC-LUAD and CPTAC-LSCC. The index has 79 MB,
the table 262 kB.
"""

from importlib import resources
from pathlib import Path

import pandas as pd

OUT = Path(__file__).resolve().parent.parent / "hdmil_lib" / "public" / "data" / "idc_slides.csv"
WANTED = {
    **dict.fromkeys(("tcga_luad", "tcga_lusc", "tcga_brca"), r"FFPE HE TP (?P<name>DX\d+)"),
    **dict.fromkeys(("cptac_luad", "cptac_lscc"), r"HE (?P<name>tumor)"),
}
"""By collection: the series that are taken, and what of their description names the slide."""

COLUMNS = {
    "collection_id": "collection",
    "PatientID": "patient",
    "name": "name",
    "crdc_series_uuid": "series",
    "instanceCount": "files",
    "series_size_MB": "megabytes",
}


def slide_table(index: pd.DataFrame) -> pd.DataFrame:
    """The rows of the index that are wanted, with the columns of the table."""
    parts = []
    for collection, pattern in WANTED.items():
        rows = index[(index["collection_id"] == collection) & (index["Modality"] == "SM")]
        parts.append(rows.join(rows["SeriesDescription"].str.extract(f"^{pattern}$")).dropna(subset=["name"]))
    table = pd.concat(parts).rename(columns=COLUMNS)[list(COLUMNS.values())]
    return table.sort_values(["collection", "patient", "name", "series"])


def main() -> None:
    path = resources.files("idc_index_data") / "idc_index.parquet"
    names = [*(set(COLUMNS) - {"name"}), "Modality", "SeriesDescription"]
    index = pd.read_parquet(path, columns=names, filters=[("Modality", "==", "SM")])
    table = slide_table(index)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUT, index=False, float_format="%.3f", lineterminator="\n")
    print(f"{OUT}: {len(table)} slides, {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
