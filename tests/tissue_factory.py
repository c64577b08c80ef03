"""Drawn thumbnails with known tissue: stains from optical densities, pen strokes, borders, tiny pieces."""

from dataclasses import dataclass

import cv2
import numpy as np

UM = 8.0
GLASS = np.array([243.0, 241.0, 244.0])
STAINS = {
    "hematoxylin": (0.65, 0.70, 0.29),
    "blue counterstain": (0.72, 0.62, 0.30),
    "eosin": (0.07, 0.99, 0.11),
    "dab": (0.27, 0.57, 0.78),
}
"""Optical densities of the dyes in red, green and blue, of length 1; a pure blue counterstain is the hardest
to tell from a pen."""
INKS = {
    "blue": (40, 70, 190),
    "navy": (35, 45, 130),
    "green": (20, 140, 80),
    "red": (205, 30, 45),
    "black": (30, 28, 30),
}


@dataclass
class Drawing:
    """A thumbnail in the making: optical density (h, w, 3), and where tissue was put, bool (h, w)."""

    density: np.ndarray
    truth: np.ndarray
    rng: np.random.Generator

    @classmethod
    def blank(cls, height_um: float = 4000, width_um: float = 5000, seed: int = 0) -> "Drawing":
        shape = round(height_um / UM), round(width_um / UM)
        return cls(np.zeros((*shape, 3)), np.zeros(shape, bool), np.random.default_rng(seed))

    def blob(self, center_um: tuple[float, float], radius_um: float) -> np.ndarray:
        """A round region with a wavy outline, bool (h, w); center is (x, y)."""
        h, w = self.truth.shape
        y, x = (np.mgrid[:h, :w] + 0.5) * UM
        dx, dy = x - center_um[0], y - center_um[1]
        angle, waves = np.arctan2(dy, dx), self.rng.uniform(0, 6, 3)
        rim = 1 + 0.06 * sum(np.sin((k + 2) * angle + p) for k, p in enumerate(waves))
        return np.hypot(dx, dy) < radius_um * rim

    def stain(self, region: np.ndarray, dyes: dict[str, float], *, tissue: bool = True) -> "Drawing":
        """Add dyes, with these mean amounts that vary by a third over 60 um, to a region."""
        amount = cv2.GaussianBlur(self.rng.normal(0, 1, region.shape), (0, 0), 60 / UM)
        amount = np.clip(1 + amount / amount.std() / 3, 0.3, 2)
        for dye, mean in dyes.items():
            self.density += (region * amount * mean)[..., None] * np.array(STAINS[dye])
        if tissue:
            self.truth |= region
        return self

    def stroke(self, color: str, points_um: list[tuple[float, float]], width_um: float = 500) -> np.ndarray:
        """Draw a pen stroke with a soft edge over everything; what it covers is no tissue any more."""
        line = np.rint(np.array(points_um) / UM).astype(np.int32)
        mask = np.zeros(self.truth.shape, np.float32)
        cv2.polylines(mask, [line], False, 1.0, round(width_um / UM), cv2.LINE_AA)
        mask = cv2.GaussianBlur(mask, (0, 0), 1.0)[..., None]
        self.density += mask * np.maximum(0, np.log10((GLASS + 1) / (np.array(INKS[color]) + 1)))
        covered = mask[..., 0] > 0.5
        self.truth &= ~covered
        return covered

    def render(self, noise: float = 1.0, glass: np.ndarray = GLASS) -> np.ndarray:
        """RGB pixels, uint8 (h, w, 3), with noise of this standard deviation."""
        pixels = (glass + 1) * 10**-self.density - 1
        pixels = pixels + self.rng.normal(0, noise, pixels.shape)
        return np.rint(pixels.clip(0, 255)).astype(np.uint8)


def agreement(mask: np.ndarray, truth: np.ndarray) -> float:
    """Dice's coefficient of two masks."""
    total = mask.sum() + truth.sum()
    return 1.0 if total == 0 else float(2 * (mask & truth).sum() / total)


def section(dyes: dict[str, float], seed: int = 0) -> Drawing:
    """Two pieces of tissue with one stain."""
    drawing = Drawing.blank(seed=seed)
    drawing.stain(drawing.blob((1500, 1900), 1000), dyes)
    return drawing.stain(drawing.blob((3700, 2200), 800), dyes)


def stained_beside(strong: dict[str, float], weak: dict[str, float], seed: int = 0) -> Drawing:
    """A section with a weak stain everywhere, and a strong one in a third of it."""
    drawing = section(weak, seed)
    return drawing.stain(drawing.blob((1400, 1700), 600), strong)


def biopsy(diameter_um: float = 110, n: int = 9, seed: int = 0) -> Drawing:
    """Small round pieces in rows."""
    drawing = Drawing.blank(seed=seed)
    for i in range(n):
        center = 700 + (i % 3) * 1500, 600 + (i // 3) * 1300
        drawing.stain(drawing.blob(center, diameter_um / 2), {"hematoxylin": 0.2, "eosin": 0.25})
    return drawing


def microarray(dyes: dict[str, float], seed: int = 0) -> Drawing:
    """Cores of 0.6 mm at a pitch of 0.9 mm, with crumbs of 60 um between them that are not wanted."""
    drawing = Drawing.blank(seed=seed)
    for i in range(20):
        x, y = 500 + (i % 5) * 900, 500 + (i // 5) * 900
        drawing.stain(drawing.blob((x, y), 300), dyes)
        drawing.stain(drawing.blob((x + 450, y + 450), 30), dyes, tissue=False)
    return drawing
