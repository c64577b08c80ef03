"""Encoders of the user's own: any model of timm, Python code, pinned revisions, local weights files."""

import hashlib
import importlib
import re
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdmil_lib.encoders.registry import ENCODERS, IMAGENET_MEAN, IMAGENET_STD, TIMM, EncoderSpec, is_code
from hdmil_lib.errors import HDMILError, nearest
from hdmil_lib.storage import loading_problem
from hdmil_lib.system_errors import check_readable, read_error

SETTINGS = ("input_size", "resize", "mean", "std")
"""What the function of an encoder in Python code may say of its input."""


def find_spec(name: str, weights: str | Path | None = None) -> tuple[EncoderSpec, nn.Module | None]:
    """The specification of an encoder by its name.

    Args:
        name: A key of `ENCODERS`; `timm:NAME` for a model of timm; or `module:function` for a function that
            returns a torch module, from normalized images (B, 3, H, W) to features (B, D), and a mapping with
            `input_size` and optionally `resize`, `mean` and `std`, as in `EncoderSpec`. The first two may end
            in `@COMMIT`, a revision of their repository on the Hugging Face hub.
        weights: File of weights for the architecture of a named encoder, .safetensors or as `torch.save`
            writes a dictionary of tensors.

    Returns:
        The specification, and for Python code the module.

    Raises:
        HDMILError: The name is unknown, the code fails or returns something else, or the file is missing.
    """
    if is_code(name):
        if weights is not None:
            raise HDMILError(f"{name}: its code loads its weights itself; leave the weights file out")
        return _from_code(name)
    base, _, revision = name.partition("@")
    spec = _from_timm(base) if base.startswith(TIMM) else ENCODERS.get(base)
    if spec is None:
        known = ", ".join(ENCODERS)
        raise HDMILError(
            f"Unknown encoder {name!r}{nearest(base, ENCODERS)}; known are {known}, and timm:NAME and "
            "module:function."
        )
    if revision:
        spec = _pinned(spec, revision)
    return (spec if weights is None else _with_file(spec, Path(weights))), None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights; nothing in it is executed.

    Raises:
        HDMILError: The file is damaged, or holds something else.
    """
    try:
        check_readable(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can end in many kinds of errors
        damage = f"cannot be read as weights ({loading_problem(error)})."
        raise read_error(HDMILError, path, error, damage) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise HDMILError(f"{path}: holds no dictionary of tensors; save `network.state_dict()`.")
    return dict(state)


def load_file_weights(network: nn.Module, spec: EncoderSpec) -> nn.Module:
    """Load the weights file of a specification; further weights in it, such as a classifier, are left out.

    Raises:
        HDMILError: The file lacks weights of the network, or they have other shapes.
    """
    state, wanted = read_weights(Path(spec.file)), network.state_dict()
    missing = [key for key in wanted if key not in state]
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or wrong:
        first = (missing or wrong)[0]
        problem = f"lacks {first}" if missing else f"holds {first} of shape {tuple(state[first].shape)}"
        raise HDMILError(
            f"{spec.file}: does not fit the encoder {spec.name!r}: it {problem}, and "
            f"{len(missing) + len(wrong)} of {len(wanted)} tensors differ. Give the weights of this "
            "architecture."
        )
    network.load_state_dict({key: state[key] for key in wanted})
    return network


def file_digest(path: str) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_timm(name: str) -> EncoderSpec:
    import timm
    from timm.models import load_model_config_from_hf

    source = name.removeprefix(TIMM)
    try:
        if source.startswith("hf-hub:"):
            given = load_model_config_from_hf(source.removeprefix("hf-hub:"))[0]
            config: Any = timm.models.PretrainedCfg(**given)
        else:
            config = timm.get_pretrained_cfg(source, allow_unregistered=False)
        size = config.input_size[-1]
        with torch.device("meta"):
            network = timm.create_model(source, pretrained=False, num_classes=0).eval()
            dim = network(torch.empty(1, 3, size, size)).shape[1]
    except Exception as error:  # timm raises many kinds for a name that it does not know
        hint = nearest(source, timm.list_models())
        raise HDMILError(
            f"Encoder {name!r}: timm has no such model{hint}, or it cannot be built ({error}). List "
            "the names with `timm.list_pretrained()`."
        ) from error
    full = source if "." in source or not config.tag or ":" in source else f"{source}.{config.tag}"
    return EncoderSpec(
        f"{TIMM}{full}",
        source=full,
        dim=dim,
        license=config.license or "see the model's page",
        input_size=size,
        resize=size,
        mean=config.mean,
        std=config.std,
        kwargs={"num_classes": 0},
    )


def _pinned(spec: EncoderSpec, revision: str) -> EncoderSpec:
    if spec.weights != "hub":
        raise HDMILError(f"Encoder {spec.name!r} does not come from the Hugging Face hub; leave '@' out.")
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise HDMILError(f"Encoder {spec.name!r}: {revision!r} is no commit; give its 40 hexadecimal digits.")
    source = spec.source if spec.source.startswith("hf-hub:") else f"hf-hub:timm/{spec.source}"
    return replace(spec, name=f"{spec.name}@{revision}", source=f"{source}@{revision}")


def _with_file(spec: EncoderSpec, path: Path) -> EncoderSpec:
    if not spec.source:
        raise HDMILError(f"Encoder {spec.name!r} has no weights; leave the weights file out.")
    if not path.is_file():
        raise HDMILError(f"{path}: no such weights file.")
    return replace(spec, weights="file", file=str(path))


def _from_code(name: str) -> tuple[EncoderSpec, nn.Module]:
    """Call the function `module:function` and check what it returns."""
    module_name, _, function_name = name.partition(":")
    try:
        with _working_folder_on_path():
            module = importlib.import_module(module_name)
            made = getattr(module, function_name)()
    except Exception as error:
        raise HDMILError(
            f"Encoder {name!r}: its code failed ({type(error).__name__}: {error}). Name a function without "
            "arguments as module:function, of a module that Python finds from here."
        ) from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise HDMILError(f"Encoder {name!r}: its function must return (torch module, settings of its input).")
    network, given = made
    unknown = sorted(set(given) - set(SETTINGS)) if isinstance(given, Mapping) else ["settings"]
    if unknown or "input_size" not in given:
        raise HDMILError(
            f"Encoder {name!r}: the settings of its input are {given!r}; expected a dictionary with "
            "input_size and optionally resize, mean and std."
        )
    settings: dict[str, Any] = {"resize": given["input_size"], "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    settings |= {key: tuple(value) if key in ("mean", "std") else value for key, value in given.items()}
    network.register_buffer("source_of_code", _source_digest(module))
    size = settings["input_size"]
    try:
        with torch.inference_mode():
            features = network.eval()(torch.zeros(1, 3, size, size))
        n_images, dim = features.shape
    except Exception as error:
        raise HDMILError(f"Encoder {name!r}: fails on an image of {size} pixels ({error}).") from error
    if n_images != 1:
        raise HDMILError(
            f"Encoder {name!r}: gives features of shape {tuple(features.shape)}, expected (1, D)."
        )
    return EncoderSpec(name, source=name, dim=dim, license="your own", weights="code", **settings), network


def _source_digest(module: Any) -> Tensor:
    """The sha256 of the file of a module, as a buffer: edited code changes the `weights_hash`."""
    path = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(path).read_bytes() if path else b"").digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


@contextmanager
def _working_folder_on_path():
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.pop(0)
