"""Small DICOM series of whole-slide images, written with pydicom."""

from pathlib import Path

import imagecodecs
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

VL_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def write_series(
    folder: Path,
    pixels: np.ndarray,
    mpp: float = 0.5,
    *,
    n_levels: int = 3,
    tile: int = 64,
    container: str = "S-1",
    jpeg: bool = False,
    colors: str = "YBR_FULL_422",
    named: str = "{uid}.dcm",
) -> list[Path]:
    """Write a pyramid of RGB pixels, (h, w, 3), one file per level, all of one series; the levels halve."""
    folder.mkdir(parents=True, exist_ok=True)
    series, paths = generate_uid(), []
    for level in range(n_levels):
        side = 2**level
        h, w = pixels.shape[0] // side, pixels.shape[1] // side
        means = pixels[: h * side, : w * side].reshape(h, side, w, side, 3).mean((1, 3))
        data = _instance(np.rint(means).astype(np.uint8), mpp * side, tile, colors if jpeg else None)
        data.SeriesInstanceUID, data.ContainerIdentifier, data.InstanceNumber = series, container, level + 1
        data.ImageType = [
            "ORIGINAL" if level == 0 else "DERIVED",
            "PRIMARY",
            "VOLUME",
            "NONE" if level == 0 else "RESAMPLED",
        ]
        paths.append(folder / named.format(uid=data.SOPInstanceUID, level=level))
        data.save_as(paths[-1], enforce_file_format=True)
    return paths


def _instance(pixels: np.ndarray, mpp: float, tile: int, jpeg: str | None) -> FileDataset:
    h, w, _ = pixels.shape
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = VL_WHOLE_SLIDE, generate_uid()
    meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = VL_WHOLE_SLIDE, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PatientID, data.PatientName = "SM", "P-1", "Nobody"
    data.StudyInstanceUID, data.FrameOfReferenceUID = generate_uid(), generate_uid()
    data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = w, h
    data.TotalPixelMatrixOriginSequence = Sequence([Dataset()])
    data.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    data.Rows = data.Columns = tile
    data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
    data.PhotometricInterpretation = jpeg or "RGB"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.DimensionOrganizationType = "TILED_FULL"
    data.ImagedVolumeWidth, data.ImagedVolumeHeight, data.ImagedVolumeDepth = (
        w * mpp / 1e3,
        h * mpp / 1e3,
        0.001,
    )
    data.NumberOfOpticalPaths, data.TotalPixelMatrixFocalPlanes = 1, 1
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1e3, mpp / 1e3], 0.001
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([measures])
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = [
        _padded(pixels[y : y + tile, x : x + tile], tile)
        for y in range(0, h, tile)
        for x in range(0, w, tile)
    ]
    data.NumberOfFrames = len(frames)
    if jpeg:
        stored = "RGB" if jpeg == "RGB" else "YCBCR"
        options = {"level": 85, "colorspace": "RGB", "outcolorspace": stored}
        options["subsampling"] = "444" if jpeg == "RGB" else "422"
        streams = [imagecodecs.jpeg8_encode(frame, **options) for frame in frames]
        data.PixelData = encapsulate(streams)
        data["PixelData"].VR = "OB"
        data.LossyImageCompression = "01"
    else:
        data.PixelData = b"".join(frame.tobytes() for frame in frames)
        data["PixelData"].VR = "OB"
    return data


def _padded(pixels: np.ndarray, tile: int) -> np.ndarray:
    frame = np.full((tile, tile, 3), 255, np.uint8)
    frame[: pixels.shape[0], : pixels.shape[1]] = pixels
    return frame
