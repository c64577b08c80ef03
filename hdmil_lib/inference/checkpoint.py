"""A model folder: the two networks, and a `config.json` that says what they were trained for."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from hdmil_lib.errors import CheckpointError
from hdmil_lib.models import DMIN, LIPN, DMINSettings
from hdmil_lib.training.checkpoint import load_weights, read_json, save_weights, weights_digest, write_json

DMIN_FILE, LIPN_FILE, CONFIG_FILE = "dmin.safetensors", "lipn.safetensors", "config.json"


@dataclass(frozen=True)
class ModelConfig:
    """What a pair of networks was trained for.

    Attributes:
        classes: Class names in the order of the branches.
        encoder: Name of the encoder that made the features.
        weights_hash: Hash of the encoder's weights.
        thresholds: On LIPN's sigmoid, one a branch, as calibrated on validation slides.
        margin: At which anytime prediction stops, from `rules.learn_margin`; None reads everything.
    """

    classes: tuple[str, ...]
    encoder: str
    weights_hash: str
    thresholds: tuple[float, ...] = (0.5, 0.5)
    margin: float | None = None


def write_model(model_dir: str | Path, dmin: DMIN, lipn: LIPN | None, config: ModelConfig) -> None:
    """Write `dmin.safetensors`, `lipn.safetensors` (where there is one) and `config.json`.

    The configuration is written last and holds the digests of both networks, so that an unfinished folder,
    or one whose files come from two models, is found out by `read_model`.
    """
    folder = Path(model_dir)
    networks = {"dmin": dmin, "lipn": lipn}
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    (folder / LIPN_FILE).unlink(missing_ok=True)
    for name, network in ((DMIN_FILE, dmin), (LIPN_FILE, lipn)):
        if network is not None:
            save_weights(network, folder / name)
    digests = {name: weights_digest(network) if network else None for name, network in networks.items()}
    write_json(folder / CONFIG_FILE, asdict(config) | {"dmin": asdict(dmin.settings), "digests": digests})


def read_model(model_dir: str | Path) -> tuple[DMIN, LIPN | None, ModelConfig]:
    """Read what `write_model` wrote.

    Returns:
        DMIN, LIPN or None, and their configuration.

    Raises:
        CheckpointError: A file is missing or damaged, or belongs to a model of another configuration.
    """
    folder = Path(model_dir)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a model folder, as `hdmil train` writes it")
    stored = read_json(path)
    try:
        settings = DMINSettings(**stored.pop("dmin"))
        digests = stored.pop("digests")
        tuples = {name: tuple(stored[name]) for name in ("classes", "thresholds")}
        config = ModelConfig(**stored | tuples)
        has_lipn = digests["lipn"] is not None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not the configuration of a model ({error!r}); give the folder that `hdmil train` wrote"
        ) from error
    dmin = _load(DMIN(settings), folder / DMIN_FILE, digests["dmin"])
    lipn = _load(LIPN(settings.n_classes), folder / LIPN_FILE, digests["lipn"]) if has_lipn else None
    return dmin, lipn, config


def _load(network: nn.Module, path: Path, digest: Any) -> nn.Module:
    load_weights(network, path)
    found = weights_digest(network)
    if found != digest:
        raise CheckpointError(
            f"{path}: weights of another model ({found}) than {CONFIG_FILE} names ({digest}); "
            "copy the whole folder again as `hdmil train` wrote it"
        )
    return network


def best_fold(run_dir: str | Path) -> int:
    """The fold of a cross-validation whose two-stage prediction reached the lowest validation loss.

    Raises:
        CheckpointError: "hdmil" was not trained in this folder.
    """
    histories = Path(run_dir).glob("hdmil/fold*/history.csv")
    losses = {int(path.parent.name[4:]): pd.read_csv(path)["val_loss"].min() for path in histories}
    if not losses:
        raise CheckpointError(f"{run_dir}: holds no trained hdmil; run the cross-validation first")
    return min(losses, key=lambda fold: losses[fold])
