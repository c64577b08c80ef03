"""Model folders: what is saved comes back to the bit; damaged, mixed or hostile folders are refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from bag_factory import make_bag
from model_factory import INFO, make_model
from safetensors.torch import load_file, save_file

from hdmil_lib.bags import write_bag
from hdmil_lib.errors import CheckpointError
from hdmil_lib.models import DMIN, HDMIL, LIPN
from hdmil_lib.models.dmin import LossWeights
from hdmil_lib.schema import MAX_BYTES

FILES = {"config.json", "model.safetensors", "README.md"}
TESTS = Path(__file__).parent


def same(a: HDMIL, b: HDMIL) -> bool:
    """Whether two models agree to the bit, and in everything else that they keep."""
    one, two = a.state_dict(), b.state_dict()
    return (
        one.keys() == two.keys()
        and all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)
        and (a.pooling, a.info, a.dmin.settings) == (b.pooling, b.info, b.dmin.settings)
    )


def shifted(model: HDMIL, by: float = 1.0) -> HDMIL:
    """Another model of the same shape."""
    other = make_model()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.lipn.classifier.bias += by
        other.dmin.heads[0].coefficients *= 1 + by
    return other


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    return folder


def refused(folder, match: str = ".") -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(CheckpointError, match=match) as caught:
        HDMIL.from_pretrained(folder)
    message = str(caught.value)
    assert message.isprintable(), message  # which a line break is not
    assert len(message) < 800, message
    return message


# What is saved comes back


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_classes": 5, "degree": 1, "k": 3, "subtyping": True},
        {"head": "linear", "self_distillation": False, "dropout": 0.0},
        {"linear_start": True, "detach_teacher": True, "loss_weights": LossWeights(teacher=0.1, rate=0.0)},
        {"keep_ratio": 1.0, "threshold": 1e-300, "temperature": 1 / 3, "embed_dim": 1, "attention_dim": 1},
    ],
    ids=["defaults", "classes", "linear", "weights", "numbers"],
)
def test_what_is_saved_comes_back_to_the_bit(tmp_path, settings):
    n_classes = settings.get("n_classes", 2)
    torch.manual_seed(1)
    dmin = DMIN(**{"in_dim": 7, "n_classes": 2, "embed_dim": 16, "attention_dim": 8, "degree": 3} | settings)
    dmin.standardize([torch.randn(50, 7)])
    lipn = LIPN(n_classes)
    lipn(torch.randint(0, 256, (40, 16, 16, 3), dtype=torch.uint8))  # running statistics of its own
    info = INFO.model_copy(
        update={
            "classes": tuple(f"Größe {c}  (µm)" for c in range(n_classes)),
            "cohort": "Köln 日本 😀",
            "metrics": {"AUC": "97.70 (1.20)", "share": 1 / 3},
            "license": "Apache-2.0",
            "tile_size": 512,
            "tile_mpp": 0.2527,
        }
    )
    thresholds = np.linspace(1e-7, 1 - 1e-7, n_classes).tolist()
    model = HDMIL(
        dmin,
        lipn,
        thresholds=thresholds,
        margin=1 / 3,
        pooling="lipn",
        trained_thresholds=thresholds[::-1],
        info=info,
    )
    model.save_pretrained(tmp_path / "deep" / "model")
    again = HDMIL.from_pretrained(str(tmp_path / "deep" / "model"))
    assert same(model, again)
    assert not again.training
    assert not again.dmin.training
    assert not again.lipn.training
    assert {p.device.type for p in again.state_dict().values()} == {"cpu"}
    assert all(p.requires_grad for p in again.parameters())
    features, patches = torch.randn(30, 7), torch.randint(0, 256, (30, 16, 16, 3), dtype=torch.uint8)
    with torch.inference_mode():
        a, b = model(features, patches), again(features, patches)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.mask, b.mask)

    again.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "deep" / "model" / name).read_bytes()


def test_a_model_that_comes_back_can_be_trained(saved):
    model = HDMIL.from_pretrained(saved)
    output = model.train()(torch.randn(9, 6), torch.randint(0, 256, (9, 16, 16, 3), dtype=torch.uint8))
    output.logits.sum().backward()
    assert model.dmin.projection[0].weight.grad.abs().sum() > 0


def test_a_model_is_saved_from_the_mode_it_is_in(saved, tmp_path):
    model = HDMIL.from_pretrained(saved).train()
    model.save_pretrained(tmp_path / "again")
    assert model.training
    assert not HDMIL.from_pretrained(tmp_path / "again").training


def test_a_model_that_does_not_know_what_it_is_for_is_not_saved(tmp_path):
    model = HDMIL(DMIN(6, 2, embed_dim=16, attention_dim=8, degree=3), LIPN(2))
    with pytest.raises(CheckpointError, match="does not know its encoder"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_in_half_precision_is_stored_in_single(tmp_path):
    model = make_model().half()
    model.save_pretrained(tmp_path)
    again = HDMIL.from_pretrained(tmp_path)
    assert same(again, model.float())
    assert again.dmin.projection[0].weight.dtype == torch.float32


def test_a_model_does_not_depend_on_the_file_that_it_came_from(saved):
    """A file that is written over in place must not change a model, or end the process."""
    model, expected = HDMIL.from_pretrained(saved), make_model()
    size = (saved / "model.safetensors").stat().st_size
    with (saved / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)
        file.truncate(100)
    assert same(model, expected)


def test_the_card_tells_people_what_the_model_is(tmp_path):
    info = INFO.model_copy(
        update={"cohort": "Köln", "license": "Apache-2.0", "metrics": {"AUC": "97.70 (1.20)"}}
    )
    model = make_model()
    HDMIL(model.dmin, model.lipn, thresholds=0.25, margin=3.5, info=info).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    header = card.split("---")[1]
    assert 'library_name: "hdmil"' in header
    assert 'license: "Apache-2.0"' in header
    for part in (
        "normal, tumor",
        "Köln",
        "color (weights c01)",
        "0.2500, 0.2500",
        "3.50",
        "| AUC | 97.70 (1.20) |",
    ):
        assert part in card


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(tmp_path, umask, mode):
    """safetensors makes files that only their owner can read."""
    before = os.umask(umask)
    try:
        make_model().save_pretrained(tmp_path / "model")
        write_bag(tmp_path / "model" / "bag.h5", make_bag("a", 1))
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert found == dict.fromkeys(FILES | {"bag.h5"}, mode)


# Folders that are not whole


def test_the_old_layout_is_named(tmp_path):
    model = make_model()
    for name, network in (("dmin", model.dmin), ("lipn", model.lipn)):
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"classes": ["a", "b"], "encoder": "color"}))
    assert "a model folder of hdmil before 0.2" in refused(tmp_path)


def damage(folder, case, tmp_path):
    """Break a model folder in one of the ways that happen; returns the name to load."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    other = tmp_path / "other"
    shifted(HDMIL.from_pretrained(folder)).save_pretrained(other)
    if case == "no folder":
        shutil.rmtree(folder)
    elif case == "a file":
        return config
    elif case == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif case == "weights missing":
        weights.unlink()
    elif case == "weights a folder":
        weights.unlink()
        weights.mkdir()
    elif case == "configuration missing":
        config.unlink()
    elif case == "configuration a folder":
        config.unlink()
        config.mkdir()
    elif case == "weights of another model":
        shutil.copy(other / "model.safetensors", folder)
    elif case == "configuration of another model":
        shutil.copy(other / "config.json", folder)
    elif case == "a setting changed":
        config.write_text(config.read_text().replace('"embed_dim": 16', '"embed_dim": 32'))
    elif case == "classes exchanged":
        text = config.read_text()
        config.write_text(
            text.replace("class 0", "x").replace("class 1", "class 0").replace('"x"', '"class 1"')
        )
    elif case == "unknown setting":
        config.write_text(config.read_text().replace('"format"', '"colour": "red", "format"'))
    return folder


def test_a_name_in_a_folder_that_exists_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hdmil_lib.models.pretrained._download", lambda *_: pytest.fail("the hub is asked"))
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError, match="models/best: no such model folder"):
        HDMIL.from_pretrained("models/best")


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("no folder", "no such model folder"),
        ("a file", "no such model folder"),
        ("empty", r"config\.json: no such file"),
        ("weights missing", r"model\.safetensors: no such file"),
        ("weights a folder", r"model\.safetensors: no such file"),
        ("configuration missing", r"config\.json: no such file"),
        ("configuration a folder", r"config\.json: no such file"),
        ("weights of another model", r"model\.safetensors: damaged, or of another model"),
        ("configuration of another model", r"model\.safetensors: damaged, or of another model"),
        ("a setting changed", r"config\.json: was changed after it was saved"),
        ("classes exchanged", r"config\.json: was changed after it was saved"),
        ("unknown setting", r"config\.json: colour is not known"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(saved, tmp_path, case, named):
    message = refused(damage(saved, case, tmp_path), named)
    assert any(word in message for word in ("train", "copy"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_refused(saved, name):
    path = saved / name
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:length])
        refused(saved, name)
    path.write_bytes(content + b"\0")
    refused(saved, name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_flipped_bit_is_found(saved, name):
    path = saved / name
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    header = rng.integers(0, min(len(content), 2000), 200)
    for place in (*header, *rng.integers(0, len(content), 200)):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        refused(saved)
    path.write_bytes(content)
    HDMIL.from_pretrained(saved)


def sealed(folder: Path) -> None:
    """Let the digests agree with the files, as whoever makes a hostile model would."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    config["weights_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    config.pop("config_sha256")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(config | {"config_sha256": digest}))


def edit_weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


WEIGHT = "dmin.projection.0.weight"
BAD_WEIGHTS = {
    "nan in dmin": lambda t: t[WEIGHT][0, 0].fill_(np.nan),
    "infinity in lipn": lambda t: t["lipn.classifier.bias"].fill_(np.inf),
    "nan in a threshold": lambda t: t["thresholds"][0].fill_(np.nan),
    "threshold of 2": lambda t: t["thresholds"].fill_(2),
    "trained threshold of -1": lambda t: t["trained_thresholds"].fill_(-1),
    "three thresholds": lambda t: t.update(thresholds=torch.zeros(3)),
    "one threshold": lambda t: t.update(thresholds=torch.tensor(0.5)),
    "nested thresholds": lambda t: t.update(thresholds=torch.zeros(1, 2)),
    "no thresholds": lambda t: t.update(thresholds=torch.zeros(0)),
    "thresholds missing": lambda t: t.pop("thresholds"),
    "margin nan": lambda t: t["margin"].fill_(np.nan),
    "margin 0": lambda t: t["margin"].fill_(0),
    "margin -inf": lambda t: t["margin"].fill_(-np.inf),
    "margin of two": lambda t: t.update(margin=torch.ones(2)),
    "weight missing": lambda t: t.pop(WEIGHT),
    "weight of another shape": lambda t: t.update({WEIGHT: torch.zeros(16, 7)}),
    "weight transposed": lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}),
    "one tensor more": lambda t: t.update(extra=torch.zeros(1)),
    "integers": lambda t: t.update({WEIGHT: torch.zeros(16, 6, dtype=torch.int64)}),
    "half precision": lambda t: t.update({WEIGHT: t[WEIGHT].half()}),
    "double precision": lambda t: t.update({WEIGHT: t[WEIGHT].double()}),
    "bool": lambda t: t.update({WEIGHT: t[WEIGHT] > 0}),
    "complex": lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.complex64)}),
    "thresholds as integers": lambda t: t.update(thresholds=torch.ones(2, dtype=torch.int64)),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_no_model_has_are_refused(saved, case):
    edit_weights(BAD_WEIGHTS[case])(saved)
    sealed(saved)
    refused(saved)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not safetensors at all",
        b"\x80\x02}q\x00.",  # a pickle
        b"\xff" * 8 + b"{}",  # a header of 2^64 bytes
        (10**8 + 1).to_bytes(8, "little") + b"{" * 100,
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (60).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'[:60],
    ],
    ids=["empty", "text", "pickle", "endless header", "large header", "no tensors", "list", "cut header"],
)
def test_a_file_that_is_not_safetensors_is_refused(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    sealed(saved)
    refused(saved, r"model\.safetensors")


# Configurations out of bounds


def put(*keys, value):
    def edit(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return edit


def drop(*keys):
    def edit(config):
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return edit


BOUNDS = {
    ("format",): [1, 3, "2", None, -1],
    ("architecture",): ["ABMIL", 1, None, []],
    ("pooling",): ["max", 1, None, ["dmin"]],
    ("info",): [None, [], "x", 1, {}],
    ("info", "classes"): [[], ["a"], ["a"] * 3, ["a"] * 1001, "ab", [1, 2], ["", "b"], ["x" * 201, "b"], None]
    + [[["a"], ["b"]], {"a": "b"}, 2],
    ("info", "encoder"): ["", 5, None, "x" * 201, ["color"]],
    ("info", "encoder_weights"): [5, None, "x" * 1001],
    ("info", "tile_size"): [0, -1, 2**40, 256.5, "256", True, None],
    ("info", "tile_mpp"): [0, -1, 1e9, "0.5", None, [0.5]],
    ("info", "patch_size"): [0, 17, 2**40, "16"],
    ("info", "metrics"): [[], "x", {"a": {}}, {"a": None}, {str(i): 1.0 for i in range(1001)}],
    ("info", "license"): [5, "x" * 1001],
    ("dmin",): [None, [], "x", {}],
    ("dmin", "in_dim"): [-1, 0, "6", 2**40, 6.5, 7, None, [6], True, 10**30],
    ("dmin", "n_classes"): [0, 1, 3, -3, 10**7, "2", 2.5, True, None],
    ("dmin", "embed_dim"): [0, -1, 17, 2**40, "16"],
    ("dmin", "attention_dim"): [0, -8, 9, 2**40],
    ("dmin", "dropout"): [5, 1, -0.1, "0.25", None, [0.25]],
    ("dmin", "degree"): [-1, 0, 4, 10**9, "3", 3.5],
    ("dmin", "temperature"): [0, -1, 1e9, "1"],
    ("dmin", "threshold"): [0, 1, -1, "0.5", [0.5, 0.5], [0.5] * 3, [], [[0.5]]],
    ("dmin", "keep_ratio"): [0, 1.5, -1, "x"],
    ("dmin", "head"): ["cnn", "linear", 3, None],
    ("dmin", "linear_start"): [1, "yes", None],
    ("dmin", "self_distillation"): [0, "no", None],
    ("dmin", "k"): [0, -1, 10**9, "32"],
    ("dmin", "subtyping"): ["x", 0],
    ("dmin", "loss_weights"): [None, [], {}, {"teacher": -1}],
    ("dmin", "loss_weights", "rate"): [-1, 1e9, "2", None],
    ("weights_sha256",): ["", "0" * 64, "A" * 64, 5, None],
    ("config_sha256",): ["", "0" * 64, 5, None],
    ("colour",): ["red"],
    ("a\nb\x1b[31m" * 20,): [1],
    ("x" * 10**6,): [1],
}

BAD_CONFIGS = {
    f"{'.'.join(keys)[:40]} = {json.dumps(value)[:30]}": put(*keys, value=value)
    for keys, values in BOUNDS.items()
    for value in values
}
BAD_CONFIGS |= {
    f"no {'.'.join(keys)}": drop(*keys)
    for keys in [
        *(("format",), ("pooling",), ("weights_sha256",), ("config_sha256",), ("info",), ("dmin",)),
        *(("info", "classes"), ("info", "encoder"), ("dmin", "in_dim"), ("dmin", "loss_weights")),
    ]
}


def three_classes(config):
    config["info"]["classes"], config["dmin"]["n_classes"] = ["a", "b", "c"], 3


def thousand_classes(config):
    config["info"]["classes"], config["dmin"]["n_classes"] = [str(i) for i in range(1000)], 1000


def largest(config):
    config["dmin"] |= {"in_dim": 65_536, "embed_dim": 65_536, "attention_dim": 65_536, "degree": 64}
    thousand_classes(config)


BAD_CONFIGS |= {
    "three classes": three_classes,
    "a thousand classes": thousand_classes,
    "all as large as can be": largest,
}

BAD_TEXTS = {
    "empty": lambda good: b"",
    "null": lambda good: b"null",
    "number": lambda good: b"5",
    "string": lambda good: b'"x"',
    "list": lambda good: b"[]",
    "object": lambda good: b"{}",
    "two objects": lambda good: good + good,
    "lists 100,000 deep": lambda good: b"[" * 100_000,
    "objects 100,000 deep": lambda good: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "metrics 100,000 deep": lambda good: good.replace(
        b'"metrics": {}', b'"metrics": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    ),
    "10 million class names": lambda good: good.replace(b'"class 0"', b'"c",' * 10**7 + b'"d"'),
    "800,000 class names": lambda good: good.replace(b'"class 0"', b'"c",' * 800_000 + b'"d"'),
    "a name of 3 MB": lambda good: good.replace(b"class 0", b"c" * 3_000_000),
    "a number of 100,000 digits": lambda good: good.replace(b'"in_dim": 6', b'"in_dim": ' + b"6" * 100_000),
    "a number beyond floats": lambda good: good.replace(b'"dropout": 0.25', b'"dropout": 1e999'),
    "NaN": lambda good: good.replace(b'"dropout": 0.25', b'"dropout": NaN'),
    "Infinity": lambda good: good.replace(b'"tile_mpp": 0.5', b'"tile_mpp": Infinity'),
    "Latin-1": lambda good: good.replace(b"class 0", b"cl\xe9ss"),
    "UTF-16": lambda good: good.decode().encode("utf-16"),
    "half a surrogate": lambda good: good.replace(b"class 0", b"\\ud800"),
    "a raw control character": lambda good: good.replace(b"class 0", b"a\nb"),
    "a line of zeros": lambda good: b"\0" * len(good),
}

PROBE = """
import json, resource, sys, time
from pathlib import Path
from hdmil_lib.models import HDMIL

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder = Path(sys.argv[1])
HDMIL.from_pretrained(folder / "good")
for path in sorted(folder.glob("bad*")):
    start, before = time.process_time(), megabytes()
    try:
        HDMIL.from_pretrained(path)
        answer = "loaded", ""
    except BaseException as error:
        answer = type(error).__name__, str(error)
    print(json.dumps([path.name, *answer, time.process_time() - start, megabytes() - before]), flush=True)
"""


def test_configurations_out_of_bounds_are_refused_at_once(tmp_path):
    """Each by a CheckpointError of one line, in a second of CPU time, without large memory; digests agree."""
    good = tmp_path / "good"
    make_model().save_pretrained(good)
    text = (good / "config.json").read_bytes()
    names = {}
    for i, (name, change) in enumerate((BAD_CONFIGS | BAD_TEXTS).items()):
        folder = tmp_path / f"bad{i:03d}"
        folder.mkdir()
        names[folder.name] = name
        os.link(good / "model.safetensors", folder / "model.safetensors")
        if name in BAD_TEXTS:
            changed = change(text)
            assert changed != text
            (folder / "config.json").write_bytes(changed)
            continue
        config = json.loads(text)
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        if "sha256" not in name:
            sealed(folder)
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer[0] for answer in answers] == list(names)
    wrong = [
        (names[folder], kind, message[:300], round(seconds, 1), round(grown))
        for folder, kind, message, seconds, grown in answers
        if kind != "CheckpointError"
        or not message.isprintable()
        or len(message) > 800
        or str(tmp_path / folder) not in message
        or seconds > 1
        or grown > 150
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_what_is_saved_is_within_the_size_that_is_read(tmp_path):
    """Also at the bounds: a thousand classes with names that JSON writes in twelve bytes per character."""
    info = INFO.model_copy(update={"classes": tuple(f"{i:03d}" + "😀" * 197 for i in range(1000))})
    model = HDMIL(DMIN(6, 1000, embed_dim=2, attention_dim=1, degree=1), LIPN(1000), info=info)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").stat().st_size < MAX_BYTES
    assert same(HDMIL.from_pretrained(tmp_path), model)


# A save that is interrupted

DRIVER = """
import errno, json, os, shutil, sys, traceback
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from test_pretrained import FILES, make_model, same, shifted
from hdmil_lib.errors import HDMILError
from hdmil_lib.models import HDMIL

torch.set_num_threads(1)
work = Path(sys.argv[1])
models = [make_model()]
models.append(shifted(models[0], 1.0))
models.append(shifted(models[0], 2.0))
models[1] = models[1].with_rules(pooling="lipn", margin=2.0)
models[0].save_pretrained(work / "first")

steps, stop_at, ending = 0, None, None
watched = None

def step():
    global steps
    steps += 1
    if steps == stop_at:
        if ending == "kill":
            os._exit(9)
        raise OSError(errno.ENOSPC, "No space left on device")

def hook(event, args):
    if watched is None or event not in ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir"):
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    if event == "os.remove" and ending == "raise":
        return  # clean-up goes on where a disk is full
    if str(args[0]).startswith(str(watched)):
        step()

sys.addaudithook(hook)

def halved(write):
    def write_half(self, content, *rest, **options):
        if watched is not None and str(self).startswith(str(watched)):
            write(self, content[: len(content) // 2], *rest, **options)
            step()
        return write(self, content, *rest, **options)
    return write_half

Path.write_bytes, Path.write_text = halved(Path.write_bytes), halved(Path.write_text)

def save(model, folder, at, how):
    '''Save in a child that is stopped at a step.'''
    global steps, stop_at, ending, watched
    child = os.fork()
    if child == 0:
        steps, stop_at, ending, watched = 0, at, how, folder
        try:
            model.save_pretrained(folder)
            os._exit(0 if steps < at else 6)  # at its end before the step, or in spite of it
        except (OSError, HDMILError):
            os._exit(8)
        except BaseException:
            traceback.print_exc()
            os._exit(7)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 6, 8, 9), code
    return {0: "whole", 6: "survived", 8: "raised", 9: "killed"}[code]

def which(folder):
    loaded = HDMIL.from_pretrained(folder)
    return [i for i, model in enumerate(models) if same(loaded, model)]

def litter(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in FILES)

def fresh(source):
    shutil.rmtree(work / "model", ignore_errors=True)
    shutil.copytree(source, work / "model")
    return work / "model"

def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}

for how in ("kill", "raise"):
    at, left = 1, []  # folders that differ after a save that was stopped
    while True:
        folder = fresh(work / "first")
        end = save(models[1], folder, at, how)
        print(json.dumps(["one", how, at, None, end, which(folder), litter(folder)]), flush=True)
        if end == "whole":
            break
        if content(folder) not in map(content, left):
            left.append(shutil.copytree(folder, work / f"{how}{at}"))
        at += 1
    for source in left:
        before, at = which(source), 1
        while True:
            folder = fresh(source)
            end = save(models[2], folder, at, how)
            row = ["two", how, source.name, at, end, which(folder), litter(folder), before]
            print(json.dumps(row), flush=True)
            if end == "whole":
                break
            at += 1
    at = 1
    while True:  # into a new folder
        folder = work / "new"
        shutil.rmtree(folder, ignore_errors=True)
        end = save(models[1], folder, at, how)
        try:
            found = which(folder)
        except Exception as error:
            found = type(error).__name__
        print(json.dumps(["new", how, at, None, end, found]), flush=True)
        if end == "whole":
            break
        at += 1
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """What a folder holds after saves that were killed, or that failed, at every write, rename and chmod."""
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path_factory.mktemp("work")), str(TESTS)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_save_that_ends_at_any_write_leaves_the_old_model_or_the_new(interrupted, how):
    rows = [row for row in interrupted if row[:2] == ["one", how]]
    assert len(rows) > 9
    assert rows[-1][4:] == ["whole", [1], []]
    assert all(row[5] == [1] for row in rows if row[4] in ("whole", "survived"))
    found = [row[5] for row in rows if row[4] in ("killed", "raised")]
    assert found == sorted(found), found
    assert found[0] == [0]
    assert all(len(models) == 1 for models in found), found
    assert len(found) > 8
    if how == "raise":
        assert all(set(row[6]) <= {"config.json.pending"} for row in rows)


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_second_save_that_ends_at_any_write_loses_nothing_either(interrupted, how):
    rows = [row for row in interrupted if row[:2] == ["two", how]]
    assert {row[7][0] for row in rows} == {0, 1}
    assert len({row[2] for row in rows}) >= 4
    for row in rows:
        _, _, _, _, end, (found,), left, (before,) = row
        whole = end in ("whole", "survived")
        assert before in (0, 1), row
        assert found in ((2,) if whole else (before, 2)), row
        assert not whole or "config.json.pending" not in left


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_first_save_that_is_interrupted_is_no_model_or_the_model(interrupted, how):
    rows = [row for row in interrupted if row[:2] == ["new", how]]
    assert all(row[5] in ("CheckpointError", [1]) for row in rows)
    assert rows[0][5] == "CheckpointError"
    assert rows[-1][5] == [1]


def test_a_pending_configuration_that_is_damaged_harms_nothing(saved):
    model = HDMIL.from_pretrained(saved)
    (saved / "config.json.pending").write_bytes(b"")
    assert same(HDMIL.from_pretrained(saved), model)
    shifted(model).save_pretrained(saved)
    assert same(HDMIL.from_pretrained(saved), shifted(model))
    assert {path.name for path in saved.iterdir()} == FILES


# The hub


COMMIT, NEXT_COMMIT = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"


class Hub(BaseHTTPRequestHandler):
    """Imitates what the Hugging Face hub answers to /owner/name/resolve/revision/file."""

    folder: Path
    requests: list

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        self.requests.append((self.command, self.path))
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repository == "owner/down":
            return self.fail(500, "InternalError", "the hub is down")
        if repository == "owner/private":
            return self.fail(401, "GatedRepo", "Access to model owner/private is restricted")
        if repository not in ("owner/model", "owner/broken", "owner/cut", "owner/moving"):
            return self.fail(404, "RepoNotFound", "Repository not found")
        if revision not in ("main", "v1", COMMIT, NEXT_COMMIT):
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        path = self.folder / name
        if not path.is_file() or (repository == "owner/broken" and name == "model.safetensors"):
            return self.fail(404, "EntryNotFound", "Entry not found")
        content = path.read_bytes()
        moved = repository == "owner/moving" and revision in ("main", NEXT_COMMIT) and name != "config.json"
        if moved:  # the branch has gone on since the configuration was read
            content += b"\0"
        self.send_response(200)
        self.send_header("X-Repo-Commit", NEXT_COMMIT if moved else COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            cut = repository == "owner/cut" and name == "model.safetensors"
            self.wfile.write(content[: len(content) // 2] if cut else content)

    def fail(self, status, code, message):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(saved):
    """Address of an imitated hub with the model "owner/model", and the requests it got."""
    requests = []
    handler = type("Handler", (Hub,), {"folder": saved, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()
    thread.join()


def with_hub(code, endpoint, folder, **variables):
    """Run code with `HDMIL` and `fetch(name) -> error`; the hub's library reads its settings at import."""
    start = f"""
        import sys, time
        sys.path.insert(0, {str(TESTS)!r})
        from hdmil_lib.models import HDMIL

        def fetch(name, **options):
            start = time.perf_counter()
            try:
                HDMIL.from_pretrained(name, **options)
            except Exception as error:
                message = str(error)
                assert type(error).__name__ == "CheckpointError", repr(error)
                assert len(message.splitlines()) == 1 and len(message) < 600, message
                assert "neither a folder here nor to be fetched from the Hugging Face hub" in message, message
                assert time.perf_counter() - start < 60
                return message
            return "loaded"
    """
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
    }
    env |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    } | variables
    program = textwrap.dedent(start) + textwrap.dedent(code)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=folder, timeout=180
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_model_is_fetched_from_the_hub(hub, saved, tmp_path):
    endpoint, requests = hub
    code = f"""
        from test_pretrained import same
        local = HDMIL.from_pretrained({str(saved)!r})
        assert same(HDMIL.from_pretrained("owner/model"), local)
        assert same(HDMIL.from_pretrained("owner/model", revision="v1"), local)
        assert same(HDMIL.from_pretrained("owner/model", revision={COMMIT!r}), local)
        assert same(HDMIL.from_pretrained("owner/moving"), local)
    """
    with_hub(code, endpoint, tmp_path)
    fetched = [path for command, path in requests if command == "GET"]
    assert fetched[0] == "/owner/model/resolve/main/config.json"
    assert fetched[1].startswith("/owner/model/resolve/")
    assert fetched[1].endswith("/model.safetensors")
    assert sum("owner/model" in path for path in fetched) == 2  # the others came from the cache

    offline = """
        assert fetch("owner/model") == "loaded"
        assert fetch("owner/unknown") != "loaded"
    """
    with_hub(offline, endpoint, tmp_path, HF_HUB_OFFLINE="1")


def test_a_model_that_cannot_be_fetched_says_why_in_one_line(hub, tmp_path):
    endpoint, _ = hub
    code = """
        for name, reason in [
            ("owner/unknown", "404"),
            ("owner/private", "401"),
            ("owner/broken", "404"),
            ("owner/cut", ""),
            ("owner/..", ""),
            ("-/x", ""),
        ]:
            message = fetch(name)
            assert message.startswith(name + ":") and reason in message, message
        assert "404" in fetch("owner/model", revision="v9")
    """
    with_hub(code, endpoint, tmp_path)


@pytest.mark.slow  # the hub's library tries again for a while
def test_without_a_connection_a_name_is_refused_in_one_line(hub, tmp_path):
    endpoint, _ = hub
    at_once = (
        "time.sleep = lambda seconds: None\n"  # the hub's library waits longer before each of five tries
    )
    with_hub(at_once + 'assert "500" in fetch("owner/down")', endpoint, tmp_path)
    with_hub(at_once + 'assert "refused" in fetch("owner/model")', "http://127.0.0.1:9", tmp_path)


def test_a_damaged_model_of_the_hub_is_refused(hub, saved, tmp_path):
    endpoint, _ = hub
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    code = """
        try:
            HDMIL.from_pretrained("owner/model")
        except Exception as error:
            assert type(error).__name__ == "CheckpointError" and "damaged" in str(error), repr(error)
        else:
            raise AssertionError("loaded")
    """
    with_hub(code, endpoint, tmp_path)
