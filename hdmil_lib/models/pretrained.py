"""Model folders in the layout of the Hugging Face hub: `model.safetensors`, `config.json` and a card."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from hdmil_lib.errors import CheckpointError
from hdmil_lib.models.dmin import DMIN, DMINSettings
from hdmil_lib.models.info import ModelInfo
from hdmil_lib.models.lipn import LIPN
from hdmil_lib.models.look import LookSettings, SecondLook
from hdmil_lib.models.settling import neutral
from hdmil_lib.schema import Schema, read_schema, to_json
from hdmil_lib.storage import read_json, remove_stale, write_json, write_whole
from hdmil_lib.system_errors import is_refused, read_error, refusal

if TYPE_CHECKING:
    from hdmil_lib.models.hdmil import HDMIL

WEIGHTS, CONFIG, PENDING, CARD = "model.safetensors", "config.json", "config.json.pending", "README.md"
OLD_FILES = ("dmin.safetensors", "lipn.safetensors")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
AGAIN = "save the model again with `save_pretrained`, or copy the whole folder again"

TYPES = {torch.float32: "F32", torch.int64: "I64"}
"""How safetensors names the types of a model's tensors."""

Model = TypeVar("Model", bound="HDMIL")


def save(model: "HDMIL", folder: Path) -> None:
    """Write a model folder; see `HDMIL.save_pretrained`.

    The new configuration is written as `config.json.pending` and renamed after the weights: if saving is
    interrupted at any point, the folder holds the previous model or the new one.
    """
    info = model.known_info
    tensors = {name: _stored(tensor) for name, tensor in model.state_dict().items()}
    weights = to_bytes(tensors, {"format": "pt"})
    config = {
        "format": 2,
        "architecture": "HDMIL",
        "pooling": model.pooling,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "info": to_json(info),
        "dmin": to_json(model.dmin.settings),
    }
    if model.look is not None:
        config["look"] = to_json(model.look.settings)
    if model.screening != "networks":
        config |= {"screening": model.screening, "random_share": model.random_share}
    config["config_sha256"] = _digest(config)
    folder.mkdir(parents=True, exist_ok=True)
    _finish_interrupted(folder)
    remove_stale(folder)
    write_json(folder / PENDING, config)
    write_whole(folder / WEIGHTS, lambda part: part.write_bytes(weights))
    os.replace(folder / PENDING, folder / CONFIG)
    write_whole(folder / CARD, lambda part: part.write_text(_card(model, info), encoding="utf-8"))


def load(kind: type[Model], name: str | Path, revision: str | None) -> Model:
    """Read a model folder, or fetch it from the hub; see `HDMIL.from_pretrained`."""
    folder = Path(name)
    if not folder.is_dir():
        local = folder.exists() or folder.parent.is_dir()  # then a/b is no name on the hub
        if local or not HUB_NAME.fullmatch(str(name)):
            raise CheckpointError(f"{name}: no such model folder; give a folder that `hdmil train` wrote")
        folder = _download(str(name), revision)
    if any((folder / file).is_file() for file in OLD_FILES) and not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder}: a model folder of hdmil before 0.2; train again, or convert it as CHANGELOG.md shows"
        )
    config = _config(folder)
    with torch.device("meta"):
        dmin = DMIN(**dict(config.dmin))
        lipn = LIPN(dmin.n_classes)
        look = None if config.look is None else SecondLook(**dict(config.look))
        thresholds, margin = torch.empty(dmin.n_classes), torch.empty(())
    expected = {f"dmin.{key}": tensor for key, tensor in dmin.state_dict().items()}
    expected |= {f"lipn.{key}": tensor for key, tensor in lipn.state_dict().items()}
    expected |= {"thresholds": thresholds, "trained_thresholds": thresholds, "margin": margin}
    networks: list[tuple[str, torch.nn.Module]] = [("dmin.", dmin), ("lipn.", lipn)]
    options: dict[str, Any] = {}
    if config.screening is not None:
        options = {"screening": config.screening, "random_share": config.random_share or 1.0}
    if look is not None:
        networks.append(("look.", look))
        expected |= {f"look.{key}": tensor for key, tensor in look.state_dict().items()}
        expected |= {"look_share": margin, "slope": margin, "bias": thresholds}
        expected["settling"] = neutral(dmin.n_classes)
    tensors = _tensors(folder / WEIGHTS, expected)
    if look is not None:
        options |= {"look": look, "bias": tensors["bias"], "settling": tensors["settling"]}
        options |= {name: float(tensors[name]) for name in ("look_share", "slope")}
    for part, network in networks:
        state = {key.removeprefix(part): t for key, t in tensors.items() if key.startswith(part)}
        network.load_state_dict(state, assign=True)
    try:
        return kind(
            dmin,
            lipn,
            thresholds=tensors["thresholds"],
            trained_thresholds=tensors["trained_thresholds"],
            margin=float(tensors["margin"]),
            pooling=config.pooling,
            info=config.info,
            **options,
        )
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}; {AGAIN}") from error


def _config(folder: Path) -> "_Config":
    """The configuration of the weights: `config.json`, or the pending one of an interrupted save.

    Raises:
        CheckpointError: A file is missing or invalid, or no configuration describes the weights.
    """
    path = folder / CONFIG
    if not path.is_file() and not (folder / PENDING).is_file():
        raise CheckpointError(f"{path}: no such file; give a model folder, as `hdmil train` writes it")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{weights}: no such file; {AGAIN}")
    digest = _file_digest(weights)
    for candidate in (path, folder / PENDING):
        if not candidate.is_file():
            continue
        config = read_schema(candidate, _Config, AGAIN)
        n_named, n_classes = len(config.info.classes), config.dmin.n_classes
        if n_named != n_classes:
            raise CheckpointError(
                f"{candidate}: names {n_named} classes for networks of {n_classes}; {AGAIN}"
            )
        content, stored = to_json(config), read_json(candidate)
        content["info"] = {key: content["info"][key] for key in stored["info"]}  # later versions know more
        if config.config_sha256 != _digest(content):
            raise CheckpointError(f"{candidate}: was changed after it was saved; {AGAIN}")
        if config.weights_sha256 == digest:
            return config
    raise CheckpointError(f"{weights}: damaged, or of another model than {CONFIG} describes; {AGAIN}")


def _finish_interrupted(folder: Path) -> None:
    """Rename the pending configuration of an interrupted save if it describes the weights of the folder.

    The next save replaces it: without this, a folder could lose its only configuration.

    Raises:
        CheckpointError: The system refuses to read it, so that nobody knows.
    """
    pending, weights = folder / PENDING, folder / WEIGHTS
    if not (pending.is_file() and weights.is_file()):
        return
    try:
        config = read_schema(pending, _Config, AGAIN)
    except CheckpointError as error:
        if is_refused(error):
            raise
        return  # damaged, so it describes no weights
    if config.weights_sha256 == _file_digest(weights):
        os.replace(pending, folder / CONFIG)


def _file_digest(path: Path) -> str:
    """Hash of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {refusal(error)}") from error


def _digest(config: Mapping[str, Any]) -> str:
    """Hash of a configuration without its own hash."""
    content = {key: value for key, value in config.items() if key != "config_sha256" and value is not None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is stored: numbers as float32, whatever the model computes in."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def _tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read the tensors of the file after comparing their names, shapes and types with those expected."""
    described = {key: (TYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in expected.items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        wrong = sorted(key for key in found.keys() | described.keys() if found.get(key) != described.get(key))
        if wrong:
            key = wrong[0] if wrong[0].isprintable() and len(wrong[0]) <= 80 else "a tensor"
            file_has, expects = (names.get(wrong[0], "nothing") for names in (found, described))
            raise CheckpointError(f"{path}: {key} is {file_has}, {CONFIG} describes {expects}; {AGAIN}")
        # Copied, since the loaded tensors are views of a file that may be overwritten, with an arbitrary
        # alignment, on which the last bit of a product depends.
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
        raise read_error(CheckpointError, path, error, f"damaged ({error}); {AGAIN}") from error
    for key, tensor in tensors.items():
        if key != "margin" and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds nan or infinite numbers; train the model again")
    return tensors


class _Config(Schema):
    """Content of `config.json`."""

    format: Literal[2]
    architecture: Literal["HDMIL"]
    pooling: Literal["dmin", "lipn"]
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    config_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    info: ModelInfo
    dmin: DMINSettings
    look: LookSettings | None = None
    screening: Literal["networks", "random"] | None = None
    random_share: Annotated[float, Field(gt=0, le=1)] | None = None


def _download(name: str, revision: str | None) -> Path:
    """Fetch configuration and weights of a model from the Hugging Face hub into its cache."""
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(hf_hub_download(name, CONFIG, revision=revision)).parent
        hf_hub_download(name, WEIGHTS, revision=folder.name)  # of the same commit, which names the folder
    except Exception as error:  # of the hub's library and of those below it
        cause: BaseException = error
        while cause.__cause__ is not None:  # the first error says most: "404 Not Found", "Connection refused"
            cause = cause.__cause__
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise CheckpointError(
            f"{name}: neither a folder here nor to be fetched from the Hugging Face hub ({reason}); check "
            "the name, the connection, and `hf auth login` for private models"
        ) from error
    return folder


def _screening(model: "HDMIL") -> str:
    if model.screening == "networks":
        return "chosen by LIPN" + (" and the second look" if model.look else "")
    share = f"{model.random_share:.0%}"
    return f"{share} at random: the networks chose no better than chance on validation slides"


def _look(model: "HDMIL") -> str:
    if model.look is None:
        return "none"
    share = float(model.look_share)
    return f"{model.look.side} px per tile, {share:.0%} of the tiles pass; not in the paper"


def _card(model: "HDMIL", info: ModelInfo) -> str:
    """Model card: what the model is for, how to use it, and its scores."""
    metrics = "\n".join(f"| {name} | {value} |" for name, value in info.metrics.items())
    scores = f"\n## Scores\n| score | value |\n| --- | --- |\n{metrics}\n" if metrics else ""
    header = {"library_name": "hdmil", "pipeline_tag": "image-classification", "tags": ["pathology", "mil"]}
    if info.license:
        header["license"] = info.license
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    margin = "none, all tiles are read" if model.margin.isinf() else f"{float(model.margin):.2f}"
    return f"""---
{lines}
---
# HDMIL: {", ".join(info.classes)}

Two-stage classification of whole-slide images: LIPN selects tiles on the thumbnail, DMIN classifies from
these (HDMIL, CVPR 2025, arXiv 2502.21130). A research model, not a medical device.

```python
import hdmil_lib as hdmil

model = hdmil.HDMIL.from_pretrained("path/of/this/folder")
print(model.predict("slide.svs"))
```

| | |
| --- | --- |
| trained on | {info.cohort or "not said"} |
| features | {info.encoder} (weights {info.encoder_weights}) |
| tiles | {info.tile_size} px at {info.tile_mpp} um/px |
| tiles to read | {_screening(model)} |
| second look | {_look(model)} |
| thresholds of LIPN | {", ".join(f"{t:.4f}" for t in model.thresholds.tolist())} |
| margin of `stream` | {margin} |
| license | {info.license or "not said"} |
| hdmil | {info.library_version} |
{scores}"""
