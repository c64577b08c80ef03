"""Settings read from the environment."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hdmil_lib import config
from hdmil_lib.config import build_dir


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
    shutil.copy(config.__file__, installed / "hdmil_lib" / "config.py")
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


def test_a_helper_ends_when_its_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        """
import multiprocessing, os, sys, time
from hdmil_lib.config import end_with_parent

def helper():
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=helper).start()
    time.sleep(60)
"""
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    helper = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(200):  # ten seconds; it takes some milliseconds
        try:
            os.kill(helper, 0)
        except ProcessLookupError:
            break
        if "Z" in Path(f"/proc/{helper}/stat").read_text().rsplit(")", 1)[1].split()[0]:
            break  # ended, and not yet collected
        time.sleep(0.05)
    else:
        pytest.fail("the helper is still there")
