"""The same work on a cluster of real processes: equal results, kills, poison, and clusters that fail."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from bag_factory import DIM, make_bags, make_cohort
from distributed import Client, LocalCluster, Scheduler, SpecCluster, Worker, WorkerPlugin, get_worker
from model_factory import ColorEncoder, make_model, write_textured_slide
from test_cli import hdmil

from hdmil_lib import cluster
from hdmil_lib.bags import read_bag
from hdmil_lib.errors import HDMILError
from hdmil_lib.progress import progress_of
from hdmil_lib.sharing import read_owner, run_folder
from hdmil_lib.training.fit import TrainSettings
from hdmil_lib.training.recipes import recipe_for

N_SLIDES = 6
pytestmark = pytest.mark.slow  # workers import PyTorch, again after each kill


class Dangerous(ColorEncoder):
    """Takes a moment, and kills its process at a slide of four tiles."""

    def __call__(self, tiles):
        time.sleep(0.3)
        if len(tiles) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(tiles)


class UseDangerous(WorkerPlugin):
    """Lets a worker use that encoder, also one that was started again."""

    def setup(self, worker):
        from hdmil_lib.encoders import loading
        from hdmil_lib.models import HDMIL

        loading.load_encoder = lambda *_, **__: Dangerous()
        HDMIL.encoder = property(lambda _: ColorEncoder())


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for i in range(N_SLIDES):
        write_textured_slide(folder / f"s{i}.tif", 3, 3, seed=i)
    return folder


@pytest.fixture(scope="module")
def address():
    """A scheduler with two workers, which are started again when they die."""
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**options, silence_logs=logging.CRITICAL) as local, Client(local) as client:
        client.register_plugin(UseDangerous())
        yield local.scheduler_address


@pytest.fixture
def client(address):
    client = cluster.connect(address)
    client.wait_for_workers(2, timeout=120)
    yield client
    client.close()


@pytest.fixture(scope="module")
def here(slides, tmp_path_factory):
    """The bags of a run without a cluster."""
    from hdmil_lib.encoders.extraction import extract

    out = tmp_path_factory.mktemp("here")
    extract(slides, ColorEncoder(), out, progress=False)
    return out


def same_bags(out, expected):
    assert sorted(p.name for p in out.glob("*.h5")) == sorted(p.name for p in expected.glob("*.h5"))
    for path in expected.glob("*.h5"):
        np.testing.assert_array_equal(read_bag(out / path.name).features, read_bag(path).features)


def holders(out):
    return [owner.pid for owner in map(read_owner, (run_folder(out) / "locks").glob("*.lock")) if owner]


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def test_bags_are_those_of_one_machine_and_a_second_run_does_nothing(client, slides, here, tmp_path):
    run = partial(cluster.extract, slides, tmp_path, client=client, progress=False)
    report = run()
    assert report["status"].tolist() == ["done"] * N_SLIDES
    same_bags(tmp_path, here)
    assert progress_of(tmp_path).processes["done"].sum() == N_SLIDES
    assert len(progress_of(tmp_path).processes) == 2
    assert run()["status"].tolist() == ["skipped"] * N_SLIDES


def test_a_worker_killed_in_mid_slide_loses_nothing(client, slides, here, tmp_path):
    report = []
    run = partial(cluster.extract, slides, tmp_path, client=client, progress=False)
    thread = threading.Thread(target=lambda: report.append(run()))
    thread.start()
    wait_for(lambda: holders(tmp_path))
    os.kill(holders(tmp_path)[0], signal.SIGKILL)
    thread.join()
    assert set(report[0]["status"]) <= {"done", "skipped"}
    same_bags(tmp_path, here)


CLIENT = """
import sys
from hdmil_lib import cluster
cluster.extract(sys.argv[2], sys.argv[3], client=cluster.connect(sys.argv[1]), progress=False)
"""


def test_a_client_that_is_killed_loses_nothing_and_the_run_resumes(address, client, slides, here, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", CLIENT, address, slides, tmp_path])
    wait_for(lambda: holders(tmp_path))
    killed.kill()
    killed.wait()
    report = cluster.extract(slides, tmp_path, client=client, progress=False)
    assert set(report["status"]) <= {"done", "skipped"}
    same_bags(tmp_path, here)
    assert progress_of(tmp_path).processes["done"].sum() == N_SLIDES, "none was done twice"


def test_a_scheduler_that_is_killed_is_said_and_the_run_resumes(slides, here, tmp_path):
    """Scheduler and worker are commands, as a person starts them."""
    place, started, found = tmp_path / "scheduler.json", [], []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}

    def start(module, *arguments):
        command = [sys.executable, "-m", f"distributed.cli.{module}", "--no-dashboard", *arguments]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, env=environment, **silent))

    def run(client):
        try:
            cluster.extract(slides, tmp_path / "bags", client=client, progress=False)
        except HDMILError as error:
            found.append(str(error))

    try:
        start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(place))
        wait_for(lambda: place.is_file() and place.read_text().rstrip().endswith("}"))
        address = json.loads(place.read_text())["address"]
        start("dask_worker", address, "--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path))
        client = cluster.connect(address)
        client.register_plugin(UseDangerous())
        thread = threading.Thread(target=run, args=(client,))
        thread.start()
        wait_for(lambda: holders(tmp_path / "bags"))
        started[0].kill()
        thread.join()
        client.close(timeout=1)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert found == [str(cluster._lost())]
    report = cluster_here(slides, tmp_path / "bags")
    assert set(report["status"]) <= {"done", "skipped"}
    same_bags(tmp_path / "bags", here)


def cluster_here(slides, out):
    from hdmil_lib.encoders.extraction import extract

    return extract(slides, ColorEncoder(), out, progress=False)


def test_a_slide_that_kills_every_worker_is_set_aside_and_the_rest_completes(client, slides, here, tmp_path):
    poison = write_textured_slide(tmp_path / "poison.tif", 2, 2, seed=9)
    out = tmp_path / "bags"
    report = cluster.extract([poison, slides], out, client=client, progress=False).set_index("slide_id")
    assert report["status"].drop("poison").tolist() == ["done"] * N_SLIDES
    assert report["status"]["poison"] == "failed"
    assert "ended 2 processes" in report["error"]["poison"]
    assert "\n" not in report["error"]["poison"]
    same_bags(out, here)
    assert dict(progress_of(out).slides["status"].value_counts()) == {"done": N_SLIDES, "failed": 1}


def test_predictions_are_those_of_one_machine(client, slides, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    table = cluster.predict_many(
        str(tmp_path / "model"), slides, out=tmp_path / "p.csv", client=client, progress=False
    )
    expected = make_model().predict_many(slides, out=tmp_path / "here.csv", device="cpu", progress=False)
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), expected.drop(columns="seconds"))


def test_folds_are_those_of_one_machine(client, tmp_path):
    (tmp_path / "cohort").mkdir()
    cohort = make_cohort(tmp_path / "cohort", *make_bags(18, n_tiles=8))
    recipe = replace(recipe_for(18, DIM), training=TrainSettings(epochs=2, min_epochs=0))
    options = {"folds": 3, "recipe": recipe, "progress": False, "workers": 1}
    there = cluster.cross_validate(cohort, ["abmil"], client=client, out=tmp_path / "there", **options)
    here = cluster.cross_validate(cohort, ["abmil"], out=tmp_path / "here", **options)
    pd.testing.assert_frame_equal(there.predictions, here.predictions)
    assert set(progress_of(tmp_path / "there").slides["slide_id"]) == {f"abmil-fold{k}" for k in range(3)}


def test_commands_take_the_address_of_a_scheduler(address, client, slides, tmp_path):
    printed = hdmil("extract", slides, "--out", tmp_path / "bags", "--scheduler", address)
    assert f"done: {N_SLIDES} slides" in printed
    make_model().save_pretrained(tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--out", tmp_path / "p.csv", "--scheduler", address)
    assert f"{N_SLIDES} of {N_SLIDES} slides" in hdmil("predict", slides, *arguments)


def test_the_command_trains_on_a_cluster(address, client, tmp_path):
    (tmp_path / "cohort").mkdir()
    cohort = make_cohort(tmp_path / "cohort", *make_bags(18, n_tiles=8))
    bags = cohort.bag_path(cohort.slide_ids[0]).parent
    arguments = ("--cohort", tmp_path / "cohort" / "cohort.csv", "--bags", bags, "--folds", 3, "--epochs", 2)
    command = ("train", *arguments, "--no-screening", "--compare", "abmil", "--scheduler", address)
    hdmil(*command, "--out", tmp_path / "trained")
    hdmil(*command[:-2], "--out", tmp_path / "here", "--workers", 1)
    tables = [pd.read_csv(tmp_path / name / "scores.csv") for name in ("trained", "here")]
    pd.testing.assert_frame_equal(*tables)
    done = progress_of(tmp_path / "trained" / "runs").processes
    assert (done["done"].sum(), os.getpid() in set(done["pid"])) == (6, False)


def test_workers_load_the_encoder_of_the_model(slides, tmp_path):
    own = ("--out", tmp_path / "p.csv", "--scheduler", "tcp://nowhere:1", "--encoder", "module:function")
    assert "leave out --encoder" in hdmil("predict", slides, "--model", tmp_path / "model", *own, code=1)


@pytest.mark.parametrize(
    "wrong", ["tcp://127.0.0.1:9", "127.0.0.1:9", "nonsense", "tcp://nowhere.invalid:8786"]
)
def test_no_scheduler_at_the_address(wrong, slides, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.connect, "__kwdefaults__", {"timeout": 0.5})
    line = hdmil("extract", slides, "--out", tmp_path / "bags", "--scheduler", wrong, code=1)
    assert "no scheduler answers there; start one with `dask scheduler`" in line
    assert not (tmp_path / "bags").exists()


def test_workers_of_another_version(client, slides, tmp_path):
    def pretend(version):
        from hdmil_lib import cluster

        cluster.__version__ = version

    client.run(pretend, "0.0.1")
    try:
        with pytest.raises(HDMILError, match=r"has hdmil 0\.0\.1, here is .*; install the same"):
            cluster.extract(slides, tmp_path, client=client, progress=False)
    finally:
        client.run(pretend, cluster.__version__)


def test_workers_without_the_weights(client, slides, tmp_path):
    def without(message):
        from hdmil_lib import cluster, errors
        from hdmil_lib.encoders import loading

        def refuse(*_, **__):
            raise errors.HDMILError(message)

        cluster._encoder.cache_clear()
        loading.load_encoder = refuse if message else lambda *_, **__: Dangerous()

    client.run(without, "uni: the weights are not here; download them first")
    try:
        with pytest.raises(
            HDMILError, match=r"^a worker on .*: uni: the weights are not here; download"
        ) as e:
            cluster.extract(slides, tmp_path, client=client, progress=False)
        assert "\n" not in str(e.value)
    finally:
        client.run(without, "")


def test_tasks_go_to_workers_with_a_gpu_where_there_are_some():
    """No GPU is needed: the resource is a number that a worker is started with."""

    def place(*, run_id, name):
        return get_worker().name

    options = {"nthreads": 1, "dashboard": False}
    workers = {
        "plain": {"cls": Worker, "options": options},
        "gpu": {"cls": Worker, "options": options | {"resources": {"GPU": 1}}},
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "port": 0}}
    tasks = {f"task{i}": (place, ()) for i in range(8)}
    with SpecCluster(workers=workers, scheduler=scheduler) as local, Client(local) as client:
        client.wait_for_workers(2, timeout=60)
        with TemporaryDirectory() as folder:
            places = cluster._run(client, tasks, Path(folder), [], False)
    assert set(places.values()) == {"gpu"}


def test_a_folder_that_workers_do_not_see(client, tmp_path):
    with pytest.raises(HDMILError, match="does not see .*/absent; use a folder that all machines share"):
        cluster.check_workers(client, [tmp_path / "absent"])


def small_cluster(**options):
    options = {"processes": False, "dashboard_address": None, "silence_logs": logging.CRITICAL} | options
    return LocalCluster(**options)


def test_workers_of_several_threads():
    with small_cluster(n_workers=1, threads_per_worker=3) as local, Client(local) as client:  # noqa: SIM117
        with pytest.raises(HDMILError, match="has 3 threads, .* start it with --nthreads 1"):
            cluster.check_workers(client, [])


def test_a_scheduler_without_workers(monkeypatch):
    with small_cluster(n_workers=0) as local, Client(local) as client:
        monkeypatch.setattr(client, "wait_for_workers", lambda *_, **__: None)
        with pytest.raises(HDMILError, match="no workers; start some with `dask worker"):
            cluster.check_workers(client, [])


def test_all_workers_gone(slides, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 0.5)
    monkeypatch.setattr(cluster, "_extract_one", wait_a_minute)
    with small_cluster(n_workers=1, threads_per_worker=1) as local:
        client = cluster.connect(local.scheduler_address)
        threading.Timer(1.5, local.scale, args=(0,)).start()
        with pytest.raises(HDMILError, match="all workers are gone .* what is finished is kept"):
            cluster.extract(slides, tmp_path, client=client, progress=False)
        client.close()


def test_the_scheduler_is_lost():
    with pytest.raises(HDMILError, match="the scheduler is gone; .* what is finished is kept"):
        cluster._watch(SimpleNamespace(status="connecting"), 0)


def wait_a_minute(*_, **__):
    time.sleep(5)
