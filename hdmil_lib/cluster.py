"""The same work on a cluster of Dask: a task per slide, or per fold and method of a cross-validation.

Every function takes a `distributed.Client` and runs here without one. Tasks write the files that the library
writes anyway, under the locks of `hdmil_lib.sharing`, and return small tables; a task that is repeated finds
its output and does nothing. Workers have one thread each; `OMP_NUM_THREADS` says how many cores a slide gets.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from hdmil_lib.config import one_core_unless_told
from hdmil_lib.errors import BagError, HDMILError
from hdmil_lib.sharing import TRIES, Shard, SharedRun, WorkList, run_folder
from hdmil_lib.slides.listing import SlideFile, Source, list_slides, names_of
from hdmil_lib.storage import check_output, readable
from hdmil_lib.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client, Future

    from hdmil_lib.cohort import Cohort
    from hdmil_lib.encoders.loading import Encoder
    from hdmil_lib.models import HDMIL
    from hdmil_lib.training.crossval import Job
    from hdmil_lib.training.trained import CrossValidation

QUIET: Mapping[str, Any] = {
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.worker.memory.monitor-interval": "1s",
    "distributed.worker.profile.enabled": False,
}
"""Dask's timers for tasks of seconds, for `dask.config.set` before a cluster is made.

By default a worker and its nanny wake a hundred times a second, which takes some percent of their core.
"""

PATIENCE = 60.0
"""Seconds that a run waits for a worker when all are gone."""


def connect(address: str, *, timeout: float = 10.0) -> "Client":
    """A client of the scheduler at an address.

    Args:
        address: Such as "tcp://node1:8786".
        timeout: Seconds to wait for an answer.

    Raises:
        HDMILError: Dask is not installed, or no scheduler answers there.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise HDMILError("a scheduler needs Dask; run `pip install 'hdmil[cluster]'`") from error
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what goes wrong is said in one line
    try:
        return Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise HDMILError(
            f"{address}: no scheduler answers there; start one with `dask scheduler`, and give the "
            "address that it prints, such as tcp://node1:8786"
        ) from error


def check_workers(client: "Client", paths: Sequence[str | Path]) -> None:
    """Check that there are workers, that they have this version of hdmil, and that they see these paths.

    Args:
        client: The client.
        paths: Files and folders that this machine has, which the workers read or write.

    Raises:
        HDMILError: One of these is not so.
    """
    wanted = [str(Path(path).resolve()) for path in paths]
    with suppress(TimeoutError):
        client.wait_for_workers(1, timeout=10)
    workers = client.scheduler_info(n_workers=-1)["workers"]
    if not workers:
        raise HDMILError("the scheduler has no workers; start some with `dask worker ADDRESS --nthreads 1`")
    for worker, about in sorted(workers.items()):
        if about["nthreads"] != 1:
            raise HDMILError(
                f"worker {worker} has {about['nthreads']} threads, which would compete for its cores; start "
                "it with --nthreads 1, and set OMP_NUM_THREADS to the number of its cores"
            )
    for worker, answer in sorted(client.run(_about, wanted, on_error="return").items()):
        if isinstance(answer, BaseException):
            raise HDMILError(f"worker {worker} cannot use hdmil {__version__} ({answer}); install it there")
        version, host, missing = answer
        if version != __version__:
            raise HDMILError(
                f"worker {worker} on {host} has hdmil {version}, here is {__version__}; install the same"
            )
        if missing:
            raise HDMILError(
                f"worker {worker} on {host} does not see {missing[0]}; use a folder that all machines share"
            )


def extract(
    slides: Source | Sequence[Source],
    out: str | Path,
    *,
    client: "Client | None" = None,
    encoder: str = "efficientnet_lite0",
    device: str = "auto",
    mpp: float | tuple[float, float] | None = None,
    shard: Shard | None = None,
    load: Mapping[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> "pd.DataFrame":
    """Turn slides into bags, here or on a cluster; see `encoders.extraction.extract`.

    Args:
        slides: The slides, in folders that the workers see.
        out: Folder of the bags, which the workers see.
        client: Client of the cluster; without one the slides are extracted here.
        encoder: Name of the encoder.
        device: Device of each worker.
        mpp: Micrometers per level-0 pixel, as `Slide` takes it.
        shard: The part of the slides to extract; all by default.
        load: Further options of `load_encoder`. For int8, each worker calibrates on the same slides.
        progress: Whether a bar is shown.
        **options: Further options of `encoders.extraction.extract`.

    Returns:
        The report of `encoders.extraction.extract`.

    Raises:
        HDMILError: The workers cannot do it, see `check_workers`, or all are gone; or as `extract` there.
    """
    import pandas as pd

    from hdmil_lib.encoders import extraction

    files, out = list_slides(slides), Path(out).resolve()
    names = names_of(files, BagError)
    kept = files if shard is None else shard.of(files)
    spec = _EncoderSpec(encoder, device, mpp, tuple(files[:8]), tuple(sorted((load or {}).items())))
    if client is None:
        given = {"mpp": mpp, "progress": progress, **options}
        return extraction.extract(kept, _encoder(spec), out, **given)
    check_output(out, folder=True)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out, *(file.path for file in kept[:1])]
    given = {"mpp": mpp, **options}
    tasks = {names[file]: (_extract_one, (_absolute(file), out, spec, given)) for file in kept}
    results = _run(client, tasks, out, paths, progress)
    rows = [results[name] for name in tasks]
    return pd.DataFrame([_failed_row(r) if isinstance(r, _Failure) else r for r in rows])


def predict_many(
    model: str,
    slides: Source | Sequence[Source],
    *,
    out: str | Path,
    client: "Client | None" = None,
    device: str = "auto",
    decoder: str = "cpu",
    shard: Shard | None = None,
    progress: bool = True,
    **options: Any,
) -> "pd.DataFrame":
    """Classify many slides into a CSV file, here or on a cluster; see `HDMIL.predict_many`.

    Args:
        model: Model folder, which the workers see, or name on the hub.
        slides: The slides, in folders that the workers see.
        out: The CSV file, in a folder that the workers see.
        client: Client of the cluster; without one the slides are classified here.
        device: Device of each worker.
        decoder: What decodes JPEG tiles; see `load_encoder`.
        shard: The part of the slides to classify; all by default.
        progress: Whether a bar is shown.
        **options: Further options of `HDMIL.predict_many`.

    Returns:
        The table of `HDMIL.predict_many`.

    Raises:
        HDMILError: The workers cannot do it, see `check_workers`, or all are gone; or as `predict_many`.
    """
    from hdmil_lib.inference import slides as inference
    from hdmil_lib.inference.tables import finished, origin_of, table_of

    files, out = list_slides(slides), Path(out).resolve()
    model = str(Path(model).resolve()) if Path(model).exists() else model
    kept = files if shard is None else shard.of(files)
    spec = _ModelSpec(model, device, decoder)
    here = _model(spec) if client is None else _model(_ModelSpec(model, "cpu", decoder))
    if client is None:
        return inference.predict_many(here, kept, out=out, device=device, progress=progress, **options)
    names = names_of(files)
    origin = origin_of(here, options.get("all_tiles", False))
    by_name = {names[file]: file for file in kept}
    done = finished(out, here.classes, origin, by_name, options.get("mpp"))
    paths: list[str | Path] = [
        out.parent,
        *([model] if Path(model).exists() else []),
        *(file.path for file in kept[:1]),
    ]
    tasks = {
        names[file]: (_predict_one, (_absolute(file), out, spec, dict(options)))
        for file in kept
        if names[file] not in done
    }
    results = _run(client, tasks, out, paths, progress)
    failures = {name: r.message for name, r in results.items() if isinstance(r, _Failure)}
    return table_of(out, here.classes, [names[file] for file in kept], failures)


def cross_validate(
    cohort: "Cohort", methods: Sequence[str], *, client: "Client | None" = None, **options: Any
) -> "CrossValidation":
    """Cross-validate, here or on a cluster; see `training.crossval.cross_validate`.

    Args:
        cohort: The cohort, whose folder of bags the workers see.
        methods: Names in `METHODS`.
        client: Client of the cluster; without one the folds are trained here.
        **options: Further options of `training.crossval.cross_validate`; `out` must be a folder that the
            workers see.

    Returns:
        The predictions, scores and models.

    Raises:
        HDMILError: The workers cannot do it, see `check_workers`, a training failed, or all workers are
            gone; or as `cross_validate` there.
    """
    from hdmil_lib.training import crossval

    if client is None:
        return crossval.cross_validate(cohort, methods, **options)
    labels, bag_dir = cohort.label_of, cohort.bag_path(cohort.slide_ids[0]).parent.resolve()
    progress = options.get("progress", True)

    def share(waves: "list[list[Job]]") -> None:
        for wave in waves:
            out = wave[0].out.resolve()
            tasks = {f"{job.method}-fold{job.fold}": (_train_one, (job, bag_dir, labels)) for job in wave}
            results = _run(client, tasks, out, [out, bag_dir], progress)
            for name, result in results.items():
                if isinstance(result, _Failure):
                    raise HDMILError(f"{name}: {result.message}")

    return crossval.cross_validate(cohort, methods, share=share, **options)


@dataclass(frozen=True)
class _EncoderSpec:
    """What a worker needs to load an encoder."""

    name: str
    device: str
    mpp: Any
    calibration: tuple[SlideFile, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class _ModelSpec:
    """What a worker needs to load a model."""

    model: str
    device: str
    decoder: str


@dataclass(frozen=True)
class _Failure:
    """Why a task has no result."""

    name: str
    message: str


Task = tuple[Callable[..., Any], tuple[Any, ...]]


def _absolute(file: SlideFile) -> SlideFile:
    return SlideFile(file.path.resolve(), file.slide_id, file.mpp)


def _failed_row(failure: _Failure) -> dict[str, Any]:
    blank = {"n_tiles": 0, "seconds": 0.0, "mpp": None, "mpp_source": None, "note": None, "n_broken": 0}
    return {"slide_id": failure.name, "status": "failed", "error": failure.message, "tried": True, **blank}


def _run(
    client: "Client", tasks: Mapping[str, Task], out: Path, paths: Sequence[str | Path], progress: bool
) -> dict[str, Any]:
    """Results of tasks by name, a `_Failure` for one that ended its workers.

    When a worker dies, the scheduler gives its task to another one. It also blames tasks that only waited on
    the dead worker, so these are submitted again; how often a slide has really ended a process is counted by
    its locks.
    """
    from distributed import KilledWorker, as_completed

    check_workers(client, paths)
    run_id, results = uuid.uuid4().hex[:8], dict[str, Any]()
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    resources = {"GPU": 1} if any("GPU" in worker["resources"] for worker in workers) else None
    tries = dict.fromkeys(tasks, 0)

    def submit(name: str) -> "Future":
        function, arguments = tasks[name]
        tries[name] += 1
        key = f"{function.__name__.strip('_')}-{run_id}-{name}-{tries[name]}"
        return client.submit(
            _worker_task, function, arguments, run_id, name, key=key, pure=False, resources=resources
        )

    with SharedRun(run_folder(out), list(tasks)), tqdm(total=len(tasks), disable=not progress) as bar:
        names = {submit(name): name for name in tasks}
        waiting, seen = as_completed(list(names), loop=client.loop), time.monotonic()
        try:
            while names:
                batch = waiting.next_batch(block=False)
                seen = _watch(client, seen) if not batch else time.monotonic()
                for future in batch:
                    name = names.pop(future)
                    error = future.exception() if future.status == "error" else None
                    if future.status == "finished":
                        results[name] = future.result()
                    elif isinstance(error, KilledWorker) and tries[name] <= TRIES:
                        again = submit(name)
                        names[again] = name
                        waiting.add(again)
                        continue
                    elif isinstance(error, KilledWorker):
                        results[name] = _Failure(name, "set aside, since it ended the workers that tried it")
                    else:
                        raise _lost() if error is None else HDMILError(_line(error))
                    bar.update()
        except BaseException:
            with suppress(Exception):  # the scheduler may be gone
                client.cancel(list(names), force=True)
            raise
    return results


def _watch(client: "Client", seen: float) -> float:
    """Wait a moment; raise if the scheduler or all workers are gone. Returns when workers were last seen."""
    time.sleep(0.05)
    if client.status != "running":
        raise _lost()
    if client.scheduler_info(n_workers=1)["workers"]:
        return time.monotonic()
    if time.monotonic() - seen > PATIENCE:
        raise HDMILError(
            f"all workers are gone for {PATIENCE:.0f} s; start new ones and run the same command again: what "
            "is finished is kept"
        )
    return seen


def _lost() -> HDMILError:
    return HDMILError(
        "the scheduler is gone; start it and its workers again, then run the same command: what is finished "
        "is kept"
    )


def _line(error: BaseException) -> str:
    return " ".join(readable(str(error)).split()) or type(error).__name__


# What runs on the workers


def _about(paths: Sequence[str]) -> tuple[str, str, list[str]]:
    """Version of hdmil, name of the machine, and those of the paths that are not there."""
    return __version__, gethostname(), [path for path in paths if not Path(path).exists()]


def _worker_task(function: Callable[..., Any], arguments: tuple[Any, ...], run_id: str, name: str) -> Any:
    """Run a task on the one thread of this worker; an error for the user names the machine."""
    one_core_unless_told()
    try:
        return function(*arguments, run_id=run_id, name=name)
    except HDMILError as error:
        raise HDMILError(f"a worker on {gethostname()}: {error}") from error


_runs: dict[tuple[Path, str], SharedRun] = {}


def _entered(out: Path, run_id: str) -> SharedRun:
    """This process' part in a run; that of an earlier run ends."""
    if (out, run_id) not in _runs:
        for run in _runs.values():
            run.__exit__()
        _runs.clear()
        _runs[out, run_id] = SharedRun(run_folder(out)).__enter__()
    return _runs[out, run_id]


@cache
def _encoder(spec: _EncoderSpec) -> "Encoder":
    from hdmil_lib.encoders import extraction
    from hdmil_lib.encoders.loading import load_encoder

    options = dict(spec.options)
    if options.get("precision") == "int8":
        options["int8_tiles"] = extraction.spread_tiles(spec.calibration, mpp=spec.mpp)
    return load_encoder(spec.name, device=spec.device, **options)


@cache
def _model(spec: _ModelSpec) -> "HDMIL":
    from hdmil_lib.devices import resolve
    from hdmil_lib.models import HDMIL

    model = HDMIL.from_pretrained(spec.model).to(resolve(spec.device))
    model.decoder = spec.decoder
    return model


def _extract_one(
    file: SlideFile, out: Path, spec: _EncoderSpec, options: dict[str, Any], *, run_id: str, name: str
) -> dict[str, Any]:
    from hdmil_lib.encoders import extraction

    run = _entered(out, run_id)
    report = extraction.extract([file], _encoder(spec), out, run=run, progress=False, **options)
    return report.iloc[0].to_dict()


def _predict_one(
    file: SlideFile, out: Path, spec: _ModelSpec, options: dict[str, Any], *, run_id: str, name: str
) -> str:
    from hdmil_lib.inference import slides

    run = _entered(out, run_id)
    table = slides.predict_many(
        _model(spec), [file], out=out, device=spec.device, run=run, progress=False, **options
    )
    return str(table["error"].iloc[0])


@cache
def _data(bag_dir: Path, labels: tuple[tuple[str, int], ...]) -> Any:
    from hdmil_lib import devices
    from hdmil_lib.bags import read_bag
    from hdmil_lib.batches import BagDataset

    bags = {slide_id: read_bag(bag_dir / f"{slide_id}.h5") for slide_id, _ in labels}
    return BagDataset(bags, dict(labels)).to(devices.resolve("auto"))


def _train_one(job: "Job", bag_dir: Path, labels: dict[str, int], *, run_id: str, name: str) -> float:
    from hdmil_lib.training.crossval import run_job

    run, started = _entered(job.out.resolve(), run_id), time.perf_counter()
    taken = WorkList(run, [name]).take()
    assert taken is not None
    settled = False
    try:
        if taken[1] is not None:
            raise HDMILError(taken[1])
        if not job.predictions.is_file():
            run_job(job, _data(bag_dir, tuple(labels.items())))
        settled = True
    finally:
        run.release(name, settled=settled)
    spent = time.perf_counter() - started
    run.record(name, "done", 0, spent)
    return spent
