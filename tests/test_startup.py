"""What is imported when: slow packages must not be loaded by those who do not need them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from slide_factory import write_slide

from hdmil_lib.encoders.engines import has_openvino
from hdmil_lib.encoders.networks import build_network, weights_hash
from hdmil_lib.encoders.registry import ENCODERS
from hdmil_lib.models import DMIN, HDMIL, LIPN, ModelInfo

SLOW = {
    "timm",
    "torchvision",
    "torch._dynamo",
    "triton",
    "pandas",
    "sklearn",
    "scipy.stats",
    "matplotlib",
    "IPython",
}
"""Packages and modules that take 0.1 to 2 seconds each to import."""


def loaded_by(code: str, cache: Path) -> set[str]:
    """Names of all modules that a fresh Python has loaded after some code."""
    print_modules = "import sys; print('modules:', *sys.modules)"
    command = [sys.executable, "-c", f"{code}\n{print_modules}"]
    environment = os.environ | {"HDMIL_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("modules:")[1].split())


def test_the_package_alone_loads_nothing_large(tmp_path):
    loaded = loaded_by("import hdmil_lib; hdmil_lib.__version__", tmp_path)
    assert loaded & (SLOW | {"torch", "numpy", "scipy", "cv2", "h5py", "openvino"}) == set()


def test_the_command_line_alone_loads_nothing_large(tmp_path):
    loaded = loaded_by("import hdmil_lib.cli", tmp_path)
    assert loaded & (SLOW | {"torch", "numpy", "scipy", "cv2", "h5py", "openvino"}) == set()


def test_settings_load_neither_torch_nor_numpy(tmp_path):
    loaded = loaded_by("import hdmil_lib.config as c; c.cache_dir(), c.build_dir(), c.n_threads()", tmp_path)
    assert loaded & (SLOW | {"torch", "numpy"}) == set()


def test_the_list_of_encoders_needs_no_torch(tmp_path):
    loaded = loaded_by("import hdmil_lib.encoders.registry", tmp_path)
    assert loaded & (SLOW | {"torch", "numpy"}) == set()


def test_what_a_prediction_needs_loads_no_slow_package(tmp_path):
    needed = ("encoders.loading", "encoders.extraction", "kernels", "models.hdmil", "models.pretrained")
    needed += ("inference.slides", "inference.anytime")
    imports = "; ".join(f"import hdmil_lib.{module}" for module in needed)
    assert loaded_by(imports, tmp_path) & SLOW == set()


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_an_encoder_from_the_cache_is_loaded_and_run_without_timm(tmp_path):
    code = """
import numpy as np
from hdmil_lib.encoders.loading import load_encoder
encoder = load_encoder(device="cpu", engine="openvino")
assert encoder(np.zeros((2, 256, 256, 3), np.uint8)).shape == (2, 320)
"""
    first, second = (loaded_by(code, tmp_path) for _ in range(2))
    assert "timm" in first
    assert second & SLOW == set()


def test_pytorch_builds_the_network(tmp_path):
    code = "from hdmil_lib.encoders.loading import load_encoder; load_encoder(device='cpu', engine='torch')"
    assert "timm" in loaded_by(code, tmp_path)


@pytest.mark.skipif(not has_openvino(), reason="no openvino")
def test_a_slide_is_classified_without_slow_packages(tmp_path):
    torch.manual_seed(0)
    info = ModelInfo(
        classes=("normal", "tumor"),
        encoder="color",
        encoder_weights=weights_hash(build_network(ENCODERS["color"])),
    )
    dmin = DMIN(49, 2, embed_dim=16, attention_dim=8, degree=3)
    HDMIL(dmin, LIPN(2), info=info).save_pretrained(tmp_path / "model")
    tissue = np.random.default_rng(0).integers([110, 40, 120], [190, 90, 190], (768, 1024, 3))
    slide = write_slide(tmp_path / "slide.tif", tissue.astype(np.uint8))
    code = f"""
from hdmil_lib.models import HDMIL
model = HDMIL.from_pretrained({str(tmp_path / "model")!r})
model.predict({str(slide)!r})
assert model.predict({str(slide)!r}, all_tiles=True).n_read == 12
"""
    loaded_by(code, tmp_path)  # fills the cache
    assert loaded_by(code, tmp_path) & SLOW == set()


def test_a_bar_that_is_written_into_a_file_leaves_few_lines():
    code = (
        "import sys; sys.argv = ['hdmil', '--version']\n"
        "from hdmil_lib.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "import time; from tqdm.auto import tqdm\n"
        "for _ in tqdm(range(30)): time.sleep(0.02)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TQDM_")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_files_are_written_in_utf_8_whatever_the_locale_says(tmp_path):
    code = (
        "import sys, pandas as pd; from pathlib import Path\n"
        "from hdmil_lib.reproduce.tables import save_table\n"
        "from hdmil_lib.splits import Split, write_splits\n"
        "folder = Path(sys.argv[1])\n"
        "save_table(pd.DataFrame({'method': ['HDMIL\\u2020'], 'AUC': [0.5]}), folder / 'scores')\n"
        "write_splits([Split(('\\xd6',), ('a',), ('b',))], folder)\n"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env=os.environ | locale)
    assert "HDMIL\u2020" in (tmp_path / "scores.md").read_text("utf-8")
    assert "\xd6" in (tmp_path / "splits_0.csv").read_text("utf-8")


def test_a_closed_pipe_ends_a_command_without_a_word():
    command = [sys.executable, "-u", "-c", "from hdmil_lib.cli import main; main()", "encoders"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
