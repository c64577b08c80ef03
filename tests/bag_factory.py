"""Small bags whose answer is known: tumor tiles have shifted features and dark patches."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from hdmil_lib.bags import Bag, EncoderIdentity, write_bag
from hdmil_lib.batches import BagDataset
from hdmil_lib.cohort import Cohort
from hdmil_lib.splits import Split

DIM = 16
ENCODER = EncoderIdentity("test", "0123abcd")


def make_bag(slide_id: str, label: int, n_tiles: int = 12, *, dim: int = DIM, seed: int = 0) -> Bag:
    """A bag of which, if positive, the first third of the tiles (one at least) is tumor."""
    rng = np.random.default_rng([seed, *slide_id.encode()])
    features = rng.normal(size=(n_tiles, dim)).astype(np.float16)
    patches = rng.integers(120, 256, (n_tiles, 16, 16, 3), dtype=np.uint8)
    if label:
        tumor = slice(0, max(1, n_tiles // 3))
        features[tumor, : dim // 2] += 3
        patches[tumor] //= 3
    side = int(np.ceil(np.sqrt(n_tiles)))
    rowcol = np.stack(np.divmod(np.arange(n_tiles), side), axis=1).astype(np.int64)
    return Bag(
        slide_id=slide_id,
        features=features,
        coords=rowcol[:, ::-1] * 256,
        rowcol=rowcol,
        shape=(side, side),
        patches=patches,
        encoder=ENCODER,
        attrs={"precision": "fp32"},
    )


def make_bags(n: int = 24, n_tiles: int = 12, **options) -> tuple[dict[str, Bag], dict[str, int]]:
    """Bags `s00`, `s01`, ... with alternating labels, and the labels."""
    labels = {f"s{i:02d}": i % 2 for i in range(n)}
    return {s: make_bag(s, label, n_tiles, **options) for s, label in labels.items()}, labels


def make_data(n: int = 24, n_tiles: int = 12, **options) -> BagDataset:
    """The same bags and labels as a data set."""
    return BagDataset(*make_bags(n, n_tiles, **options))


def make_split(bags: Iterable[str]) -> Split:
    """The first half for training, a quarter for validation, a quarter for testing."""
    ids = tuple(bags)
    n = len(ids)
    return Split(ids[: n // 2], ids[n // 2 : 3 * n // 4], ids[3 * n // 4 :])


def make_cohort(folder: Path, bags: dict[str, Bag], labels: dict[str, int]) -> Cohort:
    """Write the bags and a label file, and read them back as a cohort."""
    for bag in bags.values():
        write_bag(folder / "bags" / f"{bag.slide_id}.h5", bag)
    names = ("normal", "tumor")
    rows = [{"slide_id": s, "case_id": f"case-{s}", "label": names[labels[s]]} for s in bags]
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return Cohort.from_csv(folder / "cohort.csv", names, bags=folder / "bags")
