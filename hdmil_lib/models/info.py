"""What a model was trained for."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from hdmil_lib.schema import Schema
from hdmil_lib.version import __version__

PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
"""Text without characters that end a line or that a terminal obeys."""

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=PRINTABLE)]
Text = Annotated[str, Field(max_length=1000, pattern=PRINTABLE)]


class ModelInfo(Schema):
    """What a model was trained for, as stored in its model folder.

    Attributes:
        classes: Class names in the order of the branches.
        encoder: Name of the encoder that made the features.
        encoder_weights: Hash of the encoder's weights.
        tile_size: Side of the tiles in pixels.
        tile_mpp: Scale of the tiles in um/px.
        patch_size: Side of the patches in pixels, as LIPN takes them.
        tissue: Preset or settings of the tissue detection, as `slides.presets.describe` writes them.
        min_tissue: Smallest share of tissue in a tile.
        cohort: Name of the cohort that it was trained on.
        metrics: Test scores by name.
        license: License of the weights.
        library_version: Version of hdmil that trained it.
    """

    classes: Annotated[tuple[Name, ...], Field(min_length=2, max_length=1000)]
    encoder: Name
    encoder_weights: Text
    tile_size: Annotated[int, Field(ge=1, le=65_536)] = 256
    tile_mpp: Annotated[float, Field(gt=0, le=1000)] = 0.5
    patch_size: Literal[16] = 16
    tissue: Text = "default"
    min_tissue: Annotated[float, Field(ge=0, le=1)] = 0.25
    cohort: Text = ""
    metrics: Annotated[Mapping[Text, float | Text], Field(max_length=1000)] = {}
    license: Text = ""
    library_version: Text = __version__
