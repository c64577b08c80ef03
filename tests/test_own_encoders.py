"""Encoders of the user's own: any model of timm, local weights, Python code, pinned revisions."""

import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from model_factory import ColorEncoder, write_textured_slide
from safetensors.torch import save_file
from typer.testing import CliRunner

from hdmil_lib.bags import bag_info, read_bag
from hdmil_lib.cli import app
from hdmil_lib.encoders.engines import has_openvino
from hdmil_lib.encoders.extraction import extract_slide
from hdmil_lib.encoders.loading import load_encoder, load_recorded
from hdmil_lib.encoders.networks import hub_revision
from hdmil_lib.encoders.own import find_spec
from hdmil_lib.errors import HDMILError

CODE = """
import torch
from torch import nn

class Means(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, images):
        return torch.cat([images.mean((2, 3)) * self.weight, images.std((2, 3))], 1)

def means():
    return Means(), {"input_size": 64, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

def nothing():
    return Means()

def other_settings():
    return Means(), {"size": 64}

def fails():
    raise RuntimeError("no weights here")

def maps():
    return nn.Conv2d(3, 4, 3), {"input_size": 64}
"""


def make_tiles(n: int = 2, side: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def saved(name: str, path: Path, seed: int = 0, **options) -> torch.nn.Module:
    """A model of timm with random weights, written to a file with its classifier; the model without it."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, **options).eval()
    for module in model.modules():  # norms that do something
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    state = model.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    model.reset_classifier(0)
    return model


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A folder to work in with code of the user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_encoder_of_test.py").write_text(CODE)
    yield tmp_path / "my_encoder_of_test.py"
    sys.modules.pop("my_encoder_of_test", None)


def hdmil(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.stderr


# timm and local weights


@pytest.mark.parametrize(
    ("name", "file"),
    [("mobilenetv3_small_050", "w.safetensors"), ("densenet121", "w.pth"), ("resnetv2_50", "w.bin")],
)
def test_a_model_of_timm_takes_weights_of_a_file(tmp_path, name, file):
    """Networks of either order of norm and convolution."""
    model = saved(name, tmp_path / file)
    encoder = load_encoder(
        f"timm:{name}", weights=tmp_path / file, device="cpu", engine="torch", precision="fp32"
    )
    assert encoder.name.startswith(f"timm:{name}")
    spec, tiles = encoder.spec, make_tiles(2, encoder.input_size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    with torch.inference_mode():
        expected = model((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    assert expected.shape == (2, encoder.dim)
    # float32 sums of up to a million terms in another order
    np.testing.assert_allclose(encoder(tiles), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_other_weights_are_another_encoder_on_openvino_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HDMIL_CACHE", str(tmp_path / "cache"))
    options = {"device": "cpu", "precision": "fp32"}
    found = []
    for seed in (0, 1, 0):
        saved("mobilenetv3_small_050", tmp_path / "w.pth", seed)
        name, weights = "timm:mobilenetv3_small_050", tmp_path / "w.pth"
        both = [load_encoder(name, weights=weights, engine=e, **options) for e in ("torch", "openvino")]
        tiles = make_tiles(2, both[0].input_size)
        features = [encoder(tiles) for encoder in both]
        assert both[0].weights_hash == both[1].weights_hash
        np.testing.assert_allclose(*features, rtol=1e-2, atol=1e-3 * np.abs(features[0]).max())
        found.append((both[0].weights_hash, features[1]))
    assert found[0][0] == found[2][0] != found[1][0]
    np.testing.assert_array_equal(found[0][1], found[2][1])
    assert np.abs(found[0][1] - found[1][1]).max() > 1e-3


def test_weights_that_do_not_fit_are_named(tmp_path):
    def load(name="timm:mobilenetv3_small_050", file="w.pth"):
        load_encoder(name, weights=tmp_path / file, device="cpu", engine="torch")

    saved("mobilenetv3_small_075", tmp_path / "w.pth")
    with pytest.raises(HDMILError, match=r"w\.pth: does not fit the encoder .* holds .* of shape"):
        load()
    with pytest.raises(HDMILError, match="does not fit the encoder 'efficientnet_lite0': it lacks blocks"):
        load("efficientnet_lite0")
    with pytest.raises(HDMILError, match=r"none\.pth: no such weights file"):
        load(file="none.pth")
    with pytest.raises(HDMILError, match="'color' has no weights; leave the weights file out"):
        load("color")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(HDMILError, match="holds no dictionary of tensors"):
        load(file="list.pth")
    for name, content in (("cut.safetensors", b"123"), ("code.pth", b"\x80\x04cposix\nsystem\n.")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(HDMILError, match="cannot be read as weights"):
            load(file=name)


def test_a_name_that_timm_does_not_know_names_the_nearest():
    with pytest.raises(HDMILError, match=r"timm has no such model \(did you mean 'resnet18'\?\)"):
        find_spec("timm:resnet18_")
    with pytest.raises(HDMILError, match="did you mean 'resnet50'.*and timm:NAME and module:function"):
        find_spec("resnet5")


# Revisions


def test_a_pinned_revision_is_part_of_the_name():
    commit = "0123456789abcdef" * 2 + "01234567"
    spec, _ = find_spec(f"uni@{commit}")
    assert (spec.name, spec.source) == (f"uni@{commit}", f"hf-hub:MahmoodLab/UNI@{commit}")
    spec, _ = find_spec(f"timm:resnet18@{commit}")
    assert spec.name == f"timm:resnet18.a1_in1k@{commit}"
    assert spec.source == f"hf-hub:timm/resnet18.a1_in1k@{commit}"
    with pytest.raises(HDMILError, match="'main' is no commit; give its 40"):
        find_spec("uni@main")
    with pytest.raises(HDMILError, match="does not come from the Hugging Face hub"):
        find_spec(f"efficientnet_lite0@{commit}")


def test_the_revision_of_the_hubs_cache_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    folder = tmp_path / "models--MahmoodLab--UNI"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("b" * 40)
    assert hub_revision(find_spec("uni")[0]) == "b" * 40
    assert hub_revision(find_spec(f"uni@{commit}")[0]) == ""
    (folder / "snapshots" / commit).mkdir(parents=True)
    assert hub_revision(find_spec(f"uni@{commit}")[0]) == commit
    assert hub_revision(find_spec("color")[0]) == ""


def test_the_revision_is_recorded_in_the_bag(tmp_path):
    encoder = ColorEncoder()
    encoder.revision = "c" * 40
    extract_slide(write_textured_slide(tmp_path / "s.tif"), encoder, tmp_path / "s.h5")
    assert bag_info(tmp_path / "s.h5")["encoder_revision"] == "c" * 40


# Python code


def test_a_function_of_the_users_own_encodes(code):
    encoder = load_encoder("my_encoder_of_test:means", device="cpu")
    assert (encoder.name, encoder.dim, encoder.input_size) == ("my_encoder_of_test:means", 6, 64)
    assert encoder.engine == "torch"
    tiles = make_tiles(3, 64)
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 * 4 - 2
    expected = torch.cat([images.mean((2, 3)) * torch.tensor([1, 2, 3]), images.std((2, 3))], 1)
    np.testing.assert_allclose(encoder(tiles), expected.numpy(), atol=1e-4)


def test_edited_code_is_another_encoder(code):
    first = load_encoder("my_encoder_of_test:means", device="cpu")
    sys.modules.pop("my_encoder_of_test")
    code.write_text(CODE.replace("images.std((2, 3))", "images.amax((2, 3)) "))
    assert load_encoder("my_encoder_of_test:means", device="cpu").weights_hash != first.weights_hash


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_encoder_of_test:absent", "its code failed .AttributeError"),
        ("no_module_of_this_name:f", "its code failed .ModuleNotFoundError"),
        ("my_encoder_of_test:fails", "no weights here"),
        ("my_encoder_of_test:nothing", "must return .torch module, settings"),
        ("my_encoder_of_test:other_settings", "expected a dictionary with input_size"),
        ("my_encoder_of_test:maps", "fails on an image of 64 pixels"),
    ],
)
def test_code_that_does_not_fit_is_named(code, name, message):
    with pytest.raises(HDMILError, match=message) as caught:
        load_encoder(name, device="cpu")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_does_not_choose_what_code_runs(code):
    with pytest.raises(
        HDMILError, match="runs only if you name it yourself: --encoder my_encoder_of_test:fails"
    ):
        load_recorded("my_encoder_of_test:fails", device="cpu")


def test_from_slides_to_a_prediction_by_code_of_ones_own(code, tmp_path):
    rows = []
    for i in range(12):
        path = write_textured_slide(tmp_path / f"s{i:02d}.tif", 3, 3, seed=i)
        rows.append({"slide_id": path.stem, "case_id": i, "label": ("a", "b")[i % 2], "path": path.name})
    pd.DataFrame(rows).to_csv(tmp_path / "cohort.csv", index=False)
    own = "my_encoder_of_test:means"
    hdmil("extract", tmp_path / "cohort.csv", "--out", tmp_path / "bags", "--encoder", own, "--device", "cpu")
    assert read_bag(tmp_path / "bags" / "s00.h5").encoder.name == own
    hdmil(
        *("train", "--cohort", tmp_path / "cohort.csv", "--bags", tmp_path / "bags", "--out", tmp_path / "t"),
        *("--folds", 3, "--epochs", 1, "--workers", 1, "--device", "cpu"),
    )
    predict = ("predict", tmp_path / "s00.tif", "--model", tmp_path / "t" / "model", "--device", "cpu")
    assert "runs only if you name it yourself" in hdmil(*predict, code=1)
    assert "class    " in hdmil(*predict, "--encoder", own)
    assert "the model was trained on features of" in hdmil(*predict, "--encoder", "color", code=1)
