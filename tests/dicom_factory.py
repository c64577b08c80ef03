"""DICOM slides as the Imaging Data Commons has them: a series with one file per level of JPEG tiles."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

TILE = 256


def write_series(folder: Path, pixels: np.ndarray, mpp: float = 0.5, n_levels: int = 3) -> list[Path]:
    """Write RGB pixels (h, w, 3) as a series of levels, each half as large as the one before."""
    folder.mkdir(parents=True)
    ids = {name: generate_uid() for name in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")}
    paths = []
    for level in range(n_levels):
        step = 2**level
        image = _level(pixels[::step, ::step], mpp * step, level)
        image.update(ids)
        path = folder / f"{image.SOPInstanceUID.rsplit('.', 1)[1]}.dcm"
        dcmwrite(path, image, enforce_file_format=True)
        paths.append(path)
    return paths


def _level(pixels: np.ndarray, mpp: float, level: int) -> Dataset:
    frames = _frames(pixels)
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    image.SOPClassUID, image.SOPInstanceUID = VLWholeSlideMicroscopyImageStorage, generate_uid()
    image.Modality, image.PatientID, image.InstanceNumber = "SM", "patient", level + 1
    kind = (
        ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"] if level else ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    )
    image.ImageType = kind
    image.Rows = image.Columns = TILE
    image.TotalPixelMatrixRows, image.TotalPixelMatrixColumns = pixels.shape[:2]
    image.NumberOfFrames, image.DimensionOrganizationType = len(frames), "TILED_FULL"
    image.TotalPixelMatrixFocalPlanes = image.NumberOfOpticalPaths = 1
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "YBR_FULL_422", 0
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
    measures, frame_type, shared, path = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, frame_type.FrameType = [mpp / 1000] * 2, kind
    shared.PixelMeasuresSequence = [measures]
    shared.WholeSlideMicroscopyImageFrameTypeSequence = [frame_type]
    path.OpticalPathIdentifier = "0"
    image.SharedFunctionalGroupsSequence, image.OpticalPathSequence = [shared], [path]
    image.add_new("PixelData", "OB", encapsulate(frames))
    image["PixelData"].is_undefined_length = True
    return image


def _frames(pixels: np.ndarray) -> list[bytes]:
    frames = []
    for y in range(0, pixels.shape[0], TILE):
        for x in range(0, pixels.shape[1], TILE):
            part = pixels[y : y + TILE, x : x + TILE]
            tile = np.full((TILE, TILE, 3), 245, np.uint8)
            tile[: part.shape[0], : part.shape[1]] = part
            buffer = io.BytesIO()
            Image.fromarray(tile).save(buffer, "JPEG", quality=95, subsampling=1)
            frames.append(buffer.getvalue())
    return frames
