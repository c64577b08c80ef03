"""Which formats, inputs and faults were tried on `hdmil extract`, and what happened: the README's table.

    python tools/inputs_table.py

Makes one slide in each format, with the writers that are named, and slides that are broken in different ways;
extracts each with the command line; and writes what came of it to `docs/results/inputs.csv` and between the
`inputs` markers of the README. At last a folder of 45 good and 15 broken slides is extracted twice.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import tifffile
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from dicom_factory import write_series  # noqa: E402
from slide_factory import damage_tile, write_slide  # noqa: E402
from test_formats import png_header, write_ome  # noqa: E402
from test_survival import huge_header  # noqa: E402

from hdmil_lib.encoders.failures import read_failure  # noqa: E402
from hdmil_lib.reproduce.tables import to_markdown  # noqa: E402
from hdmil_lib.slides import Slide  # noqa: E402
from hdmil_lib.slides.sample import sample_slide  # noqa: E402

RESULTS = REPOSITORY / "docs" / "results" / "inputs.csv"
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- inputs: begin -->\n", "<!-- inputs: end -->\n"
UM = {f"PhysicalSize{axis}": 0.5 for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
TILED = {"photometric": "rgb", "tile": (256, 256), "resolution": (20_000, 20_000), "resolutionunit": 3}
JPEG = {"tile": 256, "compression": "jpeg"}

Make = Callable[[Path, np.ndarray], object]


def strips(path: Path, pixels: np.ndarray) -> None:
    options = {"photometric": "rgb", "rowsperstrip": 64, "resolution": (20_000, 20_000)}
    tifffile.imwrite(path, pixels, resolutionunit="CENTIMETER", compression="lzw", **options)


def picture(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def transparent(path: Path, pixels: np.ndarray) -> None:
    alpha = np.where(pixels.mean(2, keepdims=True) > 235, 0, 255).astype(np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], 2)).save(path)


def broken_tiles(count: int) -> Make:
    def make(path: Path, pixels: np.ndarray) -> None:
        whole = write_slide(path.with_name("whole.tiff"), pixels, pyramid=False, **JPEG)
        damage_tile(whole, path, range(20, 20 + count))
        whole.unlink()

    return make


def cut(path: Path, pixels: np.ndarray) -> None:
    write_slide(path, pixels, **JPEG)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def damaged_level(path: Path, pixels: np.ndarray) -> None:
    """All tiles of the level at 8 um/px are overwritten; the finer levels are whole."""
    write_slide(path, pixels, **JPEG)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        page = file.pages[min(3, len(file.pages) - 1)]
        for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
            data[offset : offset + size] = b"\xa5" * size
    path.write_bytes(data)


def cut_series(path: Path, pixels: np.ndarray) -> None:
    for file in write_series(path, pixels, tile=256, jpeg=True):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def missing_folder(path: Path, _: np.ndarray) -> None:
    path.write_text("a .mrxs file without its folder")


FORMATS: list[tuple[str, str, str, Make, list[str]]] = [
    ("pyramidal TIFF, JPEG tiles", "libvips", "a.tif", lambda p, x: write_slide(p, x, **JPEG), []),
    ("pyramidal TIFF, lossless tiles", "libvips", "a.tif", lambda p, x: write_slide(p, x, tile=256), []),
    ("OME-TIFF, pyramid, JPEG", "tifffile", "a.ome.tif",
     lambda p, x: write_ome(p, x, UM, tile=256, compression="jpeg"), []),
    ("OME-TIFF, pyramid, JPEG 2000", "tifffile", "a.ome.tif",
     lambda p, x: write_ome(p, x, UM, tile=256, compression="jpeg2000"), []),
    ("OME-TIFF, pyramid, Deflate", "tifffile", "a.ome.tif",
     lambda p, x: write_ome(p, x, UM, tile=256, compression="zlib"), []),
    ("TIFF in strips, LZW", "tifffile", "a.tif", strips, []),
    ("DICOM series, JPEG frames", "pydicom", "series",
     lambda p, x: write_series(p, x, tile=256, jpeg=True), []),
    ("DICOM series, frames as stored", "pydicom", "series", lambda p, x: write_series(p, x, tile=256), []),
    ("PNG, scale given by `--mpp 0.5`", "Pillow", "a.png", picture, ["--mpp", "0.5"]),
    ("PNG with transparent glass", "Pillow", "a.png", transparent, ["--mpp", "0.5"]),
    ("JPEG, scale given by `--mpp 0.5`", "Pillow", "a.jpg", picture, ["--mpp", "0.5"]),
    ("40x (0.25 um/px)", "libvips", "a.tif",
     lambda p, x: write_slide(p, x.repeat(2, 0).repeat(2, 1), (0.25, 0.25), **JPEG), []),
    ("0.55 um/px", "libvips", "a.tif", lambda p, x: write_slide(p, x, (0.55, 0.55), **JPEG), []),
    ("10x (1 um/px) with `--allow-upsampling`", "libvips", "a.tif",
     lambda p, x: write_slide(p, x, (1.0, 1.0), **JPEG), ["--allow-upsampling"]),
    ("10x (1 um/px) with `--tile-mpp 1`", "libvips", "a.tif",
     lambda p, x: write_slide(p, x, (1.0, 1.0), **JPEG), ["--tile-mpp", "1"]),
]  # fmt: skip

FAULTS: list[tuple[str, str, Make]] = [
    ("two of 72 stored tiles overwritten, no pyramid", "few.tif", broken_tiles(2)),
    ("one level overwritten, finer ones whole", "level.tif", damaged_level),
    ("forty of 72 stored tiles overwritten", "many.tif", broken_tiles(40)),
    ("file cut off after a third", "cut.tif", cut),
    ("empty file", "empty.svs", lambda p, x: p.touch()),
    ("text in a file called .svs", "text.svs", lambda p, x: p.write_text("slide_id,label\n")),
    ("link to a file that is not there", "link.svs", lambda p, x: p.symlink_to(p.with_name("away"))),
    ("folder called .svs", "folder.svs", lambda p, x: p.mkdir()),
    ("no scale", "no_scale.tif", lambda p, x: write_slide(p, x, None, **JPEG)),
    ("scale of 0.01 um/px", "absurd.tif", lambda p, x: write_slide(p, x, (0.01, 0.01), **JPEG)),
    ("10x slide, tiles of 20x", "coarse.tif", lambda p, x: write_slide(p, x, (1.0, 1.0), **JPEG)),
    ("smaller than a tile", "small.tif", lambda p, x: write_slide(p, x[:100, :100])),
    ("only glass", "glass.tif", lambda p, x: write_slide(p, np.full_like(x, 245), **JPEG)),
    ("header of 2^31 pixels a side", "huge.tif", lambda p, x: huge_header(p)),
    ("PNG header of 4,000 megapixels", "bomb.png", lambda p, x: p.write_bytes(png_header(2**16, 2**16))),
    ("floating-point samples", "float.tif",
     lambda p, x: tifffile.imwrite(p, x.astype(np.float32), **TILED)),
    ("five channels", "channels.tif",
     lambda p, x: tifffile.imwrite(p, np.repeat(x[..., :1], 5, 2), **TILED)),
    (".mrxs without its folder", "alone.mrxs", missing_folder),
    ("DICOM files cut in half", "half", cut_series),
]  # fmt: skip


def extract(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `hdmil extract` with the encoder that needs no weights."""
    command = [
        sys.executable,
        "-c",
        "from hdmil_lib.cli import main; main()",
        "extract",
        "--encoder",
        "color",
    ]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)


def outcome(folder: Path, make: Make, name: str, pixels: np.ndarray, options: list[str]) -> str:
    """What `hdmil extract` says of one slide, in one line without paths."""
    path = folder / "slides" / name
    path.parent.mkdir(parents=True)
    make(path, pixels)
    done = extract(path, "--out", folder / "bags", *options)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "slide/s" not in line]
    said = [line.partition(": ")[2] for line in lines if line.startswith(("done", "note"))]
    errors = [line for line in lines if line.startswith("error")]
    text = "; ".join(said) if said else "refused: " + " ".join(errors)
    for hidden in (
        f"{path.parent}/",
        str(path.parent),
        f"error: {path.stem}: ",
        f"{name}: ",
        f"{path.stem}: ",
    ):
        text = text.replace(hidden, "")
    return re.sub(r"[\d.]{30,}dcm", "<UID>.dcm", text).replace("1 slides, ", "").removeprefix("error: ")


def folder_of_sixty(folder: Path, pixels: np.ndarray) -> list[str]:
    """What happens to 45 good and 15 broken slides in one folder, in sentences."""
    slides = folder / "slides"
    slides.mkdir(parents=True)
    for i in range(45):
        write_slide(slides / f"good{i:02d}.tif", pixels[: 1504 + 16 * i], **JPEG)
    broken = [fault for fault in FAULTS if not fault[1].startswith(("few", "level"))][:15]
    for _, name, make in broken:
        make(slides / name, pixels)
    first = extract(slides, "--out", folder / "bags")
    bags = sorted(path.stem for path in (folder / "bags").glob("*.h5"))
    reasons = [read_failure(path).reason for path in (folder / "bags" / "failed").glob("*.json")]
    second = extract(slides, "--out", folder / "bags")
    return [
        f"{len(bags)} bags, all of the good slides: {bags == [f'good{i:02d}' for i in range(45)]}",
        f"{len(reasons)} reasons, {len(set(reasons))} different",
        f"exit code {first.returncode}",
        f"a second run: {second.stdout.splitlines()[-1]}; exit code {second.returncode}"
        if "nothing to do" not in second.stdout
        else f"a second run says that there is nothing to do; exit code {second.returncode}",
    ]


def main() -> None:
    with Slide(sample_slide()) as slide:
        pixels = slide.read_field(0, 0, slide.dimensions, slide.mpp[0])
    pixels = np.ascontiguousarray(pixels[:2304, :2048])
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for i, (kind, writer, name, make, options) in enumerate(FORMATS):
            result = outcome(Path(temporary) / f"format{i}", make, name, pixels, options)
            rows.append({"input": kind, "written by": writer, "what happened": result})
        result = outcome(
            Path(temporary) / "svs", lambda p, x: p.symlink_to(sample_slide()), "a.svs", pixels, []
        )
        rows.insert(
            0, {"input": "Aperio SVS, a real slide", "written by": "scanner", "what happened": result}
        )
        for i, (kind, name, make) in enumerate(FAULTS):
            result = outcome(Path(temporary) / f"fault{i}", make, name, pixels, [])
            rows.append({"input": kind, "written by": "a fault", "what happened": result})
        together = folder_of_sixty(Path(temporary) / "sixty", pixels)
    table = pd.DataFrame(rows)
    rows.append(
        {
            "input": "folder of 45 good, 15 broken slides",
            "written by": "both",
            "what happened": "; ".join(together),
        }
    )
    table = pd.DataFrame(rows).set_index("input")
    RESULTS.write_text(table.to_csv())
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{to_markdown(table)}{END}{after}")
    print(to_markdown(table))


if __name__ == "__main__":
    main()
