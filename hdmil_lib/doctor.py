"""Whether everything that a long run needs is there: libraries, encoders, cache, GPU, and readable slides."""

import importlib.metadata
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import openslide
import torch
from packaging.requirements import Requirement

from hdmil_lib.config import cache_dir, n_threads
from hdmil_lib.encoders.engines import has_openvino
from hdmil_lib.encoders.networks import weights_source
from hdmil_lib.encoders.registry import ENCODERS
from hdmil_lib.errors import HDMILError
from hdmil_lib.kernels.dispatch import use_triton
from hdmil_lib.slides.gpu_decoding import nvjpeg
from hdmil_lib.slides.listing import SlideFile, Source, list_slides
from hdmil_lib.slides.reader import Slide
from hdmil_lib.storage import readable
from hdmil_lib.version import __version__

SHOWN = ("torch", "timm", "openslide-python", "openslide-bin", "h5py", "numpy", "opencv-python-headless")
"""Libraries whose versions are named."""

LOW_SPACE, NO_SPACE = 10 * 2**30, 2**30
"""Bytes on the disk of the cache below which there is a warning, and below which a run will fail: the default
cohorts take 2 GB, the weights of a foundation model up to 5 GB."""

SLOW_THUMBNAIL = 2**30
"""Pixels of the coarsest level from which a thumbnail takes more than about ten seconds."""

State = Literal["ok", "warning", "fails"]


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: What was checked.
        state: "ok", "warning" (a run works, but not as well as it could) or "fails".
        finding: What was found and, unless it is ok, what to do.
    """

    name: str
    state: State
    finding: str


def examine(
    slides: Source | Sequence[Source] = (), *, mpp: float | tuple[float, float] | None = None
) -> Iterator[Check]:
    """Check this installation and the headers of slides, one after the other.

    Args:
        slides: Slides to open, as `extract` takes them; none by default.
        mpp: Micrometers per level-0 pixel, as `Slide` takes it.

    Yields:
        The checks, in the order in which a run needs what they are about.

    Raises:
        SlideError: A folder or table names no slide.
    """
    yield from _libraries()
    yield from _encoders()
    yield _cache()
    yield from _hardware()
    if slides:
        yield from _slides(list_slides(slides), mpp)


def _libraries() -> Iterator[Check]:
    yield Check("hdmil", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    problems = [problem for line in _requirements() if (problem := _unmet(Requirement(line)))]
    for problem in problems:
        yield Check("libraries", "fails", problem)
    if not problems:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
        yield Check("libraries", "ok", f"{versions}, OpenSlide {openslide.__library_version__}")


def _requirements() -> list[str]:
    """What hdmil needs in any case, without the extras."""
    try:
        return [line for line in importlib.metadata.requires("hdmil") or [] if "extra ==" not in line]
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return list(SHOWN)


def _unmet(needed: Requirement) -> str:
    """What is wrong with a library that is needed, or nothing."""
    if needed.marker is not None and not needed.marker.evaluate():
        return ""
    try:
        found = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{needed.name} is missing; run `pip install '{needed}'`"
    if needed.specifier.contains(found, prereleases=True):
        return ""
    return f"{needed.name} is {found}, {needed.specifier} is needed; run `pip install '{needed}'`"


def _encoders() -> Iterator[Check]:
    if has_openvino():
        yield Check(
            "engine", "ok", f"openvino {importlib.metadata.version('openvino')} on the CPU, and torch"
        )
    else:
        remedy = "run `pip install 'hdmil[fast]'`"
        yield Check("engine", "warning", f"openvino is missing, which encodes faster on a CPU; {remedy}")
    at_hand: list[str] = []
    to_fetch: list[str] = []
    for name, spec in ENCODERS.items():
        try:
            present = spec.weights == "none" or weights_source(spec) is not None
        except HDMILError as error:
            yield Check(f"encoder {name}", "fails", str(error))
            continue
        (at_hand if present else to_fetch).append(name)
    later = f"; downloaded at their first use: {', '.join(to_fetch)}" if to_fetch else ""
    yield Check("encoders", "ok", f"weights at hand: {', '.join(at_hand)}{later}")


def _cache() -> Check:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "set HDMIL_CACHE to a folder that can be written"
        return Check("cache", "fails", f"{folder}: {error.strerror or error}; {remedy}")
    found = f"{folder}, {free / 2**30:,.1f} GiB free"
    if free >= LOW_SPACE:
        return Check("cache", "ok", found)
    state: State = "fails" if free < NO_SPACE else "warning"
    return Check("cache", state, f"{found}; make room, or set HDMIL_CACHE to a folder on another disk")


def _hardware() -> Iterator[Check]:
    yield Check("CPU", "ok", f"{n_threads()} threads; OMP_NUM_THREADS changes it")
    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            yield Check("GPU", "ok", "Apple's is there, and used when asked for: --device mps")
        elif shutil.which("nvidia-smi"):
            remedy = "see https://pytorch.org/get-started for the right one"
            yield Check("GPU", "warning", f"the driver is there, but this PyTorch does not use it; {remedy}")
        else:
            yield Check("GPU", "ok", "none; everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        yield from _gpu(torch.device("cuda", index))


def _gpu(gpu: torch.device) -> Iterator[Check]:
    name = torch.cuda.get_device_name(gpu)
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(gpu))
    state: State = "warning" if free < 2 else "ok"
    advice = "; end other programs on it, or use another with --device" if free < 2 else ""
    yield Check(f"GPU {gpu}", state, f"{name}, {free:.1f} of {total:.1f} GiB free{advice}")
    if use_triton("auto", torch.empty(1, device=gpu)):
        yield Check(f"kernels {gpu}", "ok", "Triton runs them")
    else:
        remedy = "install triton, or use a GPU of compute capability 7.5 and more"
        finding = f"formulas of PyTorch run instead, correct but slower; {remedy}"
        yield Check(f"kernels {gpu}", "warning", finding)
    try:
        nvjpeg(gpu)
        yield Check(f"JPEG {gpu}", "ok", "nvImageCodec decodes tiles there when asked for: --decoder nvjpeg")
    except HDMILError as error:
        yield Check(f"JPEG {gpu}", "warning", f"the CPU decodes tiles. {error}")


def _slides(files: Sequence[SlideFile], mpp: float | tuple[float, float] | None) -> Iterator[Check]:
    for file in files:
        yield _header(file, mpp)
    for name, count in Counter(file.slide_id for file in files).items():
        if count > 1:
            yield Check(
                "names",
                "fails",
                f"{count} slides are called {readable(name)}; name them in a CSV with slide_id and path",
            )


def _header(file: SlideFile, mpp: float | tuple[float, float] | None) -> Check:
    name = f"slide {readable(file.slide_id)}"
    try:
        with Slide(file.path, file.scale(mpp)) as slide:
            width, height = slide.dimensions
            found = f"{width:,} x {height:,} px, {slide.vendor}, {len(slide.levels)} levels, "
            found += f"{slide.mpp[0]:.4g} um/px ({slide.scale.source})"
            notes = list(slide.scale.notes)
            if slide.levels[-1].width * slide.levels[-1].height > SLOW_THUMBNAIL:
                notes.append("has no small level, so that its thumbnail takes long; convert it to a pyramid")
    except Exception as error:  # whatever is wrong with a slide is its finding
        return Check(name, "fails", " ".join(readable(str(error)).split()) or type(error).__name__)
    return Check(name, "warning" if notes else "ok", "; ".join([found, *notes]))
