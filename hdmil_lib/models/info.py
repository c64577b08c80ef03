"""What a model was trained for."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field

from hdmil_lib.schema import Schema
from hdmil_lib.version import __version__

PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
"""Text without characters that end a line or that a terminal obeys."""

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=PRINTABLE)]
Text = Annotated[str, Field(max_length=1000, pattern=PRINTABLE)]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


def name_digest(slide_id: str) -> str:
    """Hash of the name of a slide, so that a model that is published names no slides; 12 digits."""
    return hashlib.sha256(slide_id.encode()).hexdigest()[:12]


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
        seen: Of `name_digest`, of the slides on which it was trained or its epoch was chosen.
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
    seen: Annotated[tuple[Digest, ...], Field(max_length=1_000_000)] = ()
    metrics: Annotated[Mapping[Text, float | Text], Field(max_length=1000)] = {}
    license: Text = ""
    library_version: Text = __version__

    def seen_among(self, slide_ids: Iterable[str]) -> list[str]:
        """The slides, by name, on which the model was trained: their scores are too good."""
        seen = set(self.seen)
        return [slide_id for slide_id in slide_ids if name_digest(slide_id) in seen]
