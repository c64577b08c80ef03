"""Slides are found where users keep them: folders in folders, DICOM series, tables with names and scales."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from dicom_factory import write_series
from model_factory import ColorEncoder, write_textured_slide
from PIL import Image
from slide_factory import slide_properties
from vendor_factory import blobs, zeiss

from hdmil_lib.bags import read_bag
from hdmil_lib.encoders.extraction import extract, spread_tiles
from hdmil_lib.errors import CohortError, SlideError
from hdmil_lib.slides import Slide
from hdmil_lib.slides.listing import LARGE_IMAGE, list_slides, slide_files
from hdmil_lib.slides.scale import IfUnknown
from hdmil_lib.storage import read_table


@pytest.fixture
def slide(tmp_path):
    return write_textured_slide(tmp_path / "a.tif", 2, 2)


def test_folders_are_searched_with_those_below_them(slide, tmp_path):
    for name in ("p1/x/one.tif", "p2/two.TIF", "p2/no_suffix", "p2/other.foo"):
        target = tmp_path / "all" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(slide, target)
    for name in ("._two.TIF", ".hidden.tif", "notes.txt", "labels.csv"):
        (tmp_path / "all" / "p2" / name).write_bytes(b"no slide")
    (tmp_path / "all" / "p2" / "unknown.bin").write_bytes(b"no slide")
    found = [str(path.relative_to(tmp_path / "all")) for path in slide_files(tmp_path / "all")]
    assert found == ["p1/x/one.tif", "p2/no_suffix", "p2/other.foo", "p2/two.TIF"]


def test_the_data_of_a_mrxs_file_is_part_of_it(slide, tmp_path):
    folder = tmp_path / "all"
    (folder / "s").mkdir(parents=True)
    (folder / "s.mrxs").write_bytes(b"")
    shutil.copy(slide, folder / "s" / "inside.tif")
    assert [path.name for path in slide_files(folder)] == ["s.mrxs"]


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)


@pytest.mark.parametrize("named", ["{uid}.dcm", "level{level}"])
def test_files_of_a_dicom_series_are_one_slide(tmp_path, pixels, named):
    first = write_series(tmp_path / "all" / "one", pixels, container="S-1", named=named)
    second = write_series(tmp_path / "all" / "two", pixels, container="S-2", named=named)
    (tmp_path / "all" / "bad.dcm").write_bytes(b"damaged")
    expected = [("bad", "all"), ("S-1", "one"), ("S-2", "two")]
    assert [(s.slide_id, s.path.parent.name) for s in list_slides(tmp_path / "all")] == expected
    assert [s.slide_id for s in list_slides([*first, second[1], tmp_path / "all" / "one"])] == ["S-1", "S-2"]
    for path in first:
        with Slide(path) as slide:
            np.testing.assert_array_equal(slide.read_field(0, 0, (200, 150), 0.5), pixels)


def test_series_without_a_container_are_named_by_their_folder(tmp_path, pixels):
    write_series(tmp_path / "case 7", pixels, container="")
    assert [slide.slide_id for slide in list_slides(tmp_path)] == ["case 7"]


def test_series_of_one_container_have_names_of_their_own(tmp_path, pixels):
    for _ in range(2):
        write_series(tmp_path / "all", pixels, container="S-1")
    names = [slide.slide_id for slide in list_slides(tmp_path)]
    assert len({*names}) == 2
    assert all(name.startswith("S-1_") for name in names)


def test_a_table_may_name_a_series(tmp_path, pixels):
    path = write_series(tmp_path / "one", pixels)[0]
    (tmp_path / "labels.csv").write_text(f"slide_id,path\nmine,one/{path.name}\n")
    assert [slide.slide_id for slide in list_slides(tmp_path / "labels.csv")] == ["mine"]


def test_large_color_images_of_a_folder_are_slides(slide, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    wide = np.full((64, LARGE_IMAGE, 3), 200, np.uint8)
    for name, image in {
        "large.png": wide,
        "large.jpg": wide,
        "tile.png": wide[:, :512],
        "tile.jpg": wide[:, :512],
        "mask.png": wide[..., 0],
        "s1_heatmap.png": wide,
        "s10.png": wide,
    }.items():
        Image.fromarray(image).save(folder / name)
    shutil.copy(slide, folder / "s1.tif")
    tifffile.imwrite(folder / "tile.tif", wide[:, :512], photometric="rgb")
    tifffile.imwrite(folder / "strips.tif", wide, photometric="rgb")
    (folder / "damaged.tif").write_bytes(b"damaged")
    (folder / "damaged.png").write_bytes(b"damaged")
    (folder / "gone.svs").symlink_to(tmp_path / "nowhere.svs")
    expected = ["damaged.tif", "gone.svs", "large.jpg", "large.png", "s1.tif", "s10.png", "strips.tif"]
    assert [path.name for path in slide_files(folder)] == expected
    assert slide_files(folder / "tile.png") == [folder / "tile.png"]


def test_the_images_of_a_vms_file_are_part_of_it(tmp_path):
    wide = Image.fromarray(np.full((64, LARGE_IMAGE, 3), 200, np.uint8))
    wide.save(tmp_path / "part.jpg")
    (tmp_path / "s.vms").write_text("[Virtual Microscope Specimen]\nImageFile=part.jpg\n")
    assert [path.name for path in slide_files(tmp_path)] == ["s.vms"]


def test_a_folder_of_tiles_says_what_to_do(tmp_path):
    for i in range(3):
        Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.raises(SlideError, match="no slides in it; 3 images in it .* name the files"):
        list_slides(tmp_path)


def test_a_table_names_slides_of_one_file_name_and_their_scales(slide, tmp_path):
    for patient in ("P1", "P2"):
        (tmp_path / patient).mkdir()
        shutil.copy(slide, tmp_path / patient / "HE.tif")
    table = "slide_id;path;mpp\nfirst ; P1/HE.tif;\nsecond;P2/HE.tif;0.25\n"
    (tmp_path / "labels.csv").write_text(table)
    slides = list_slides(tmp_path / "labels.csv")
    assert [(s.slide_id, s.path.parent.name, s.mpp) for s in slides] == [
        ("first", "P1", None),
        ("second", "P2", 0.25),
    ]
    assert [s.scale(None) for s in slides] == [None, 0.25]
    assert [s.scale(IfUnknown(0.4)) for s in slides] == [IfUnknown(0.4), 0.25]
    assert [s.scale(0.4) for s in slides] == [0.4, 0.4]
    report = extract(tmp_path / "labels.csv", ColorEncoder(), tmp_path / "bags", progress=False)
    assert report["status"].tolist() == ["done", "done"]
    bags = [read_bag(tmp_path / "bags" / f"{name}.h5") for name in ("first", "second")]
    assert [bag.slide_id for bag in bags] == ["first", "second"]
    assert len(bags[0]) == 4 > len(bags[1])
    again = extract(tmp_path / "labels.csv", ColorEncoder(), tmp_path / "bags", progress=False)
    assert again["status"].tolist() == ["skipped", "skipped"]
    (tmp_path / "labels.csv").write_text(table.replace("0.25", "quarter"))
    with pytest.raises(CohortError, match=r"mpp of P2/HE.tif is 'quarter', expected a number"):
        list_slides(tmp_path / "labels.csv")


def test_a_scale_fills_in_only_where_the_file_does_not_say(slide, tmp_path):
    options = {"progress": False}
    filled = extract(slide, ColorEncoder(), tmp_path / "filled", mpp=IfUnknown(0.25), **options)
    forced = extract(slide, ColorEncoder(), tmp_path / "forced", mpp=0.25, **options)
    assert (filled["n_tiles"].item(), forced["n_tiles"].item()) == (4, 1)
    assert extract(slide, ColorEncoder(), tmp_path / "filled", **options)["status"].item() == "skipped"
    assert (filled["mpp_source"].item(), forced["mpp_source"].item()) == ("properties", "given")
    refused = extract(slide, ColorEncoder(), tmp_path / "forced", **options)
    assert "made with a scale that was given, 0.25 um/px" in refused["error"].item()
    again = extract(slide, ColorEncoder(), tmp_path / "forced", mpp=0.25, **options)
    assert (again["status"].item(), again["mpp"].item()) == ("skipped", 0.25)


def test_an_odd_scale_is_in_the_report(slide, tmp_path):
    with slide_properties({"openslide.objective-power": "10"}):
        report = extract(slide, ColorEncoder(), tmp_path, progress=False)
    assert "while the objective power says 1" in report["note"].item()


def test_nothing_found_is_an_error(tmp_path):
    with pytest.raises(SlideError, match="no slides in it"):
        list_slides(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"PK\x03\x04rest", "is a spreadsheet"),
        ("slide_id,label\ncafé,é\n".encode("latin-1"), "is not text in UTF-8"),
        (b"slide_id,label\na,b,c,d\n", "cannot be read as a table"),
        (b"a\0b,c\n", "is no text"),
    ],
)
def test_tables_that_are_none_are_one_clear_line(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(CohortError, match=message) as caught:
        read_table(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_of_many_programs_are_read_alike(tmp_path, encoding, separator):
    rows = [["slide_id", " label "], ["a", "tumor "], ["b", " é"], ["c", ""]]
    text = "\r\n".join(separator.join(row) for row in rows)
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    expected = pd.DataFrame({"slide_id": ["a", "b", "c"], "label": ["tumor", "é", pd.NA]})
    found = read_table(tmp_path / "a.csv")
    assert found.columns.tolist() == ["slide_id", "label"]
    assert found.fillna("-").to_numpy().tolist() == expected.fillna("-").to_numpy().tolist()


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(CohortError, match="no such label file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(CohortError, match="name a file in it"):
        read_table(tmp_path)


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\b", "..", ".hidden", "a\x1b[31m"])
def test_a_name_that_is_no_file_name_is_refused(slide, tmp_path, name):
    (tmp_path / "labels.csv").write_text(f'slide_id,path\n"{name}",a.tif\n')
    with pytest.raises(CohortError, match="cannot be the name of a bag|holds control characters"):
        list_slides(tmp_path / "labels.csv")


def test_a_column_that_is_there_twice_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("slide_id,label,label\na,b,c\n")
    with pytest.raises(CohortError, match="'label' is there more than once"):
        read_table(tmp_path / "a.csv")


def test_int8_tiles_are_read_at_the_scale_of_the_table(slide, tmp_path):
    (tmp_path / "labels.csv").write_text("path,mpp\na.tif,0.25\n")
    assert len(spread_tiles(tmp_path / "labels.csv")) == 1
    assert len(spread_tiles(slide)) == 4


def test_a_file_that_cannot_be_opened_is_listed_and_a_folder_is_named(slide, tmp_path, monkeypatch):
    """As another user sees a file and a folder without permission."""
    (tmp_path / "closed.svs").write_bytes(b"x" * 200)
    (tmp_path / "inner").mkdir()
    opened, listed = Path.open, Path.iterdir

    def no_file(self, *arguments, **options):
        if self.name == "closed.svs":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", no_file)
    assert "closed" in {found.slide_id for found in list_slides(tmp_path)}

    def no_folder(self):
        if self.name == "inner":
            raise PermissionError(13, "Permission denied")
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", no_folder)
    with pytest.raises(SlideError, match="inner: the folder cannot be read .Permission denied."):
        list_slides(tmp_path)


VMS, VMU = (
    "[Virtual Microscope Specimen]\nNoLayers=1",
    "[Uncompressed Virtual Microscope Specimen]\nNoLayers=1",
)

ODD = {
    "jpeg.czi": (lambda p: zeiss(p, blobs(80, 60), 1), r"not supported .*JPEG compression.*Convert it"),
    "type3.czi": (lambda p: zeiss(p, blobs(80, 60), 3), r"not supported .*Convert it to OME-TIFF"),
    "cut.czi": (lambda p: p.write_bytes(b"ZISRAWFILE".ljust(32, b"\0")), r"Short read.*download it again"),
    "no.czi": (lambda p: p.write_bytes(b"no slide"), r"not a slide that OpenSlide can read"),
    "cut.btf": (lambda p: p.write_bytes(b"II+\0\x08\0\0\0"), r"not a slide that can be .*download it again"),
    "no.btf": (lambda p: p.write_bytes(b"no slide"), r"not a slide that OpenSlide can read"),
    "part.vms": (
        lambda p: p.write_text(f"{VMS}\nImageFile=part.jpg\nMapFile=m.jpg\n"),
        r"part\.jpg is missing, which holds pixels; copy it",
    ),
    "part.vmu": (
        lambda p: p.write_text(f"{VMU}\nImageFile=part.ngr\n"),
        r"part\.ngr is missing, which holds pixels; copy it",
    ),
    "no.vmu": (lambda p: p.write_bytes(b"no slide"), r"not a slide that OpenSlide can read"),
    "alone.mrxs": (lambda p: p.write_bytes(b"\xff\xd8"), r"its folder alone/ is missing.*copy it beside"),
    "preview.vsi": (
        lambda p: tifffile.imwrite(p, blobs(80, 60), photometric="rgb"),
        r"not supported: \.vsi files of Olympus\. Convert it",
    ),
    "a.isyntax": (lambda p: p.write_bytes(b"data"), r"not supported: \.isyntax files .*\. Convert it"),
}
"""Files that no reader can read, and what is said of them."""


def test_what_is_said_of_files_that_cannot_be_read(slide, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    shutil.copy(slide, folder / "A.SVS")
    zeiss(folder / "good.czi", tifffile.imread(slide, key=0))
    (folder / "._A.SVS").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    for name, (build, _) in ODD.items():
        build(folder / name)
    assert sorted(path.name for path in slide_files(folder)) == sorted(("A.SVS", "good.czi", *ODD))
    for name, (_, message) in ODD.items():
        (result,) = extract(folder / name, ColorEncoder(), tmp_path / name, progress=False).itertuples()
        assert result.status == "failed"
        assert re.search(message, result.error), result.error
        assert "\n" not in result.error
        assert ("not supported" in result.error) != bool(re.search("download|copy", result.error))
    good = [folder / "A.SVS", folder / "good.czi"]
    report = extract(good, ColorEncoder(), tmp_path / "bags", progress=False)
    assert report["status"].tolist() == ["done", "done"]
    assert report["n_tiles"].nunique() == 1


def test_a_file_of_macos_that_is_named_says_which_is_meant(tmp_path):
    (tmp_path / "._A.SVS").write_bytes(b"\0\5\x16\7")
    with pytest.raises(SlideError, match=r"written by macOS beside A\.SVS, not a slide; name that file"):
        Slide(tmp_path / "._A.SVS", 0.5)


def test_a_vms_file_that_is_closed_does_not_end_the_listing(tmp_path, monkeypatch):
    Image.fromarray(np.full((64, LARGE_IMAGE, 3), 200, np.uint8)).save(tmp_path / "part.jpg")
    (tmp_path / "s.vms").write_text("[Virtual Microscope Specimen]\nImageFile=part.jpg\n")
    opened = Path.open

    def no_file(self, *arguments, **options):
        if self.suffix == ".vms":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", no_file)
    assert [path.name for path in slide_files(tmp_path)] == ["part.jpg", "s.vms"]


def test_other_depths_of_a_vms_file_may_be_missing(tmp_path):
    images = "ImageFile=a.jpg\r\nImageFile(1,0)=b.jpg\r\nImageFile(1,0,0)=deep.jpg\r\nMapFile=m.jpg"
    (tmp_path / "s.vms").write_text(f"{VMS}\r\n{images}")
    for name in ("a.jpg", "m.jpg"):
        (tmp_path / name).write_bytes(b"\xff\xd8")
    with pytest.raises(SlideError, match=r"b\.jpg is missing"):
        Slide(tmp_path / "s.vms")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(SlideError, match=r"s\.vms: (?!.* is missing)"):
        Slide(tmp_path / "s.vms")


def test_links_that_lead_back_are_followed_once(slide, tmp_path):
    folder = tmp_path / "all"
    (folder / "one").mkdir(parents=True)
    (folder / "scan.svs").mkdir()
    shutil.copy(slide, folder / "one" / "a.tif")
    shutil.copy(slide, folder / "scan.svs" / "b.tif")
    for link, target in (
        ("one/loop", "."),
        ("one/up", ".."),
        ("two", "one"),
        ("scan.svs/again.svs", "."),
        ("scan.svs/up.svs", ".."),
    ):
        (folder / link).symlink_to(target, target_is_directory=True)
    assert [path.name for path in slide_files(folder)] == ["a.tif", "b.tif"]


def test_a_slide_that_is_reached_on_two_ways_is_listed_once(slide, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.tif").symlink_to(slide)
    (tmp_path / "other name.tif").symlink_to(slide)
    monkeypatch.chdir(tmp_path)
    ways = [slide, "a.tif", "sub/../a.tif", "sub/a.tif", tmp_path / "sub"]
    assert [found.path for found in list_slides(ways)] == [slide]
    assert [found.slide_id for found in list_slides([slide, "other name.tif"])] == ["a", "other name"]


def test_a_table_may_not_give_a_file_two_names(slide, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("slide_id,path\nx,a.tif\nx,a.tif\n")
    assert [found.slide_id for found in list_slides(table)] == ["x"]
    table.write_text("slide_id,path\nx,a.tif\ny,a.tif\n")
    with pytest.raises(CohortError, match="a.tif is listed as 'x' and as 'y'; keep one row per file"):
        list_slides(table)
