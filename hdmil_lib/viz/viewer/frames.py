"""The static frame of the viewer: a picture of the slide with an overlay, marked tiles and a scale bar."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from hdmil_lib.viz.style import INK, ORANGE, YELLOW

Box = tuple[float, float, float, float]
BAR_PX = 120
"""Length that the scale bar comes close to, from below."""


def static_frame(
    picture: Image.Image,
    mpp: float,
    layer: tuple[np.ndarray, tuple[int, int]] | None = None,
    opacity: float = 0.5,
    marked: Sequence[Box] = (),
    selected: Box | None = None,
) -> bytes:
    """Draw an overlay, marked tiles and a scale bar over a picture of a slide.

    Args:
        picture: The slide.
        mpp: Micrometers per pixel of the picture.
        layer: The overlay, uint8 (h, w, 4), and the (width, height) that it covers, from the corner.
        opacity: Opacity of the overlay, 0 to 1.
        marked: Left, top, right and lower edges of tiles to frame.
        selected: Those of the tile to frame in orange.

    Returns:
        A PNG file.
    """
    frame = picture.convert("RGBA")
    if layer is not None:
        image, size = layer
        over = Image.fromarray(image).resize(size, Image.Resampling.NEAREST)
        over.putalpha(over.getchannel("A").point(lambda alpha: round(alpha * opacity)))
        frame.alpha_composite(over.crop((0, 0, *frame.size)))
    draw = ImageDraw.Draw(frame)
    chosen = [(selected, 4, ORANGE)] if selected else []
    for box, width, color in [*((box, 2, YELLOW) for box in marked), *chosen]:
        left, top, right, bottom = box
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=INK, width=width + 2)
        draw.rectangle(box, outline=color, width=width)
    _scale_bar(draw, frame.size, mpp)
    buffer = io.BytesIO()
    frame.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def bar_length(mpp: float, longest_px: float = BAR_PX) -> float:
    """Length in um of the longest scale bar of 1, 2 or 5 times a power of ten that fits into some pixels.

    Args:
        mpp: Micrometers per pixel.
        longest_px: The pixels.
    """
    room = mpp * longest_px
    power = 10.0 ** np.floor(np.log10(room))
    return float(max(step * power for step in (1, 2, 5) if step * power <= room))


def _scale_bar(draw: ImageDraw.ImageDraw, size: tuple[int, int], mpp: float) -> None:
    """A bar with its length in the lower left corner, on white so that it is seen on any tissue."""
    length = bar_length(mpp, min(BAR_PX, size[0] / 2))
    text = f"{length:g} µm" if length < 1000 else f"{length / 1000:g} mm"
    font = ImageFont.truetype(findfont("DejaVu Sans"), 13)  # comes with matplotlib
    width = max(length / mpp, draw.textlength(text, font))
    left, bottom = 8, size[1] - 8
    draw.rectangle((left, bottom - 34, left + width + 12, bottom), fill="white")
    draw.text((left + 6, bottom - 32), text, fill=INK, font=font)
    draw.rectangle((left + 6, bottom - 10, left + 6 + length / mpp, bottom - 6), fill=INK)
