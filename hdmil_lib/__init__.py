"""HDMIL: fast and accurate classification of gigapixel pathology slides, as a course and a library.

The names below are all that most users need; each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hdmil_lib.version import __version__

if TYPE_CHECKING:
    from hdmil_lib.bags import Bag, read_bag
    from hdmil_lib.batches import BagBatch, BagDataset
    from hdmil_lib.cohort import Cohort
    from hdmil_lib.config import Config, setup
    from hdmil_lib.encoders.extraction import extract
    from hdmil_lib.encoders.loading import load_encoder
    from hdmil_lib.errors import HDMILError
    from hdmil_lib.models import HDMIL, ModelInfo, create_model
    from hdmil_lib.slides import Slide, TileGrid
    from hdmil_lib.training.crossval import cross_validate
    from hdmil_lib.training.fit import TrainSettings, fit
    from hdmil_lib.training.trained import CrossValidation

_HOMES = {
    "Bag": "bags",
    "BagBatch": "batches",
    "BagDataset": "batches",
    "Cohort": "cohort",
    "Config": "config",
    "CrossValidation": "training.trained",
    "HDMIL": "models",
    "HDMILError": "errors",
    "ModelInfo": "models",
    "Slide": "slides",
    "TileGrid": "slides",
    "TrainSettings": "training.fit",
    "create_model": "models",
    "cross_validate": "training.crossval",
    "extract": "encoders.extraction",
    "fit": "training.fit",
    "load_encoder": "encoders.loading",
    "read_bag": "bags",
    "setup": "config",
}

__all__ = [
    "HDMIL",
    "HDMILError",
    "Bag",
    "BagBatch",
    "BagDataset",
    "Cohort",
    "Config",
    "CrossValidation",
    "ModelInfo",
    "Slide",
    "TileGrid",
    "TrainSettings",
    "__version__",
    "create_model",
    "cross_validate",
    "extract",
    "fit",
    "load_encoder",
    "read_bag",
    "setup",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        from difflib import get_close_matches

        spelled = {known.lower(): known for known in _HOMES}
        close = get_close_matches(name.lower(), spelled, n=1)
        hint = f"; did you mean {spelled[close[0]]!r}?" if close else f"; it has {', '.join(_HOMES)}"
        raise AttributeError(f"hdmil_lib has no {name!r}{hint}")
    value = getattr(import_module(f"hdmil_lib.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
