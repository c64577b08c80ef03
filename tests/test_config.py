"""Settings read from the environment."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdmil_lib import config
from hdmil_lib.config import build_dir, cache_dir
from hdmil_lib.errors import HDMILError


def test_in_a_checkout_the_build_folder_is_there_wherever_one_stands(monkeypatch, tmp_path):
    monkeypatch.delenv("HDMIL_BUILD", raising=False)
    monkeypatch.chdir(tmp_path)
    assert build_dir() == Path(__file__).resolve().parent.parent / "build"


@pytest.mark.parametrize("beside", [[], ["pyproject.toml"], ["notebooks/"]])
def test_installed_the_build_folder_is_in_the_working_directory(tmp_path, beside):
    """Other packages' folders in site-packages do not make a checkout."""
    installed, work = tmp_path / "site-packages", tmp_path / "work"
    (installed / "hdmil_lib").mkdir(parents=True)
    work.mkdir()
    for name in ("config.py", "errors.py"):
        shutil.copy(Path(config.__file__).with_name(name), installed / "hdmil_lib")
    for name in beside:
        (installed / name).mkdir() if name.endswith("/") else (installed / name).touch()
    code = "import hdmil_lib.config as c; print(c.__file__); print(c.build_dir())"
    environment = {"PYTHONPATH": str(installed), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [str(installed / "hdmil_lib" / "config.py"), str(work / "build")]


def test_a_build_folder_that_is_named_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("HDMIL_BUILD", str(tmp_path / "elsewhere"))
    assert build_dir() == tmp_path / "elsewhere"


def test_threads_are_set_and_restored(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with config.torch_threads(config.n_threads()):
        assert asked == [3]
    assert asked == [3, 1]


def test_the_cache_needs_no_home_folder_if_it_is_named(monkeypatch, tmp_path):
    """In containers a user may have a number alone."""

    def nobody(name):
        raise KeyError(name)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setenv("HDMIL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    for unset in (lambda: monkeypatch.setenv("HDMIL_CACHE", ""), lambda: monkeypatch.delenv("HDMIL_CACHE")):
        unset()
        with pytest.raises(HDMILError, match="there is no home folder for the cache; set HDMIL_CACHE"):
            cache_dir()
