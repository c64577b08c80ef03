"""Tissue map of a synthetic slide: outline, zones, vessels, and foci of tumor and of its mimics.

For any grid of points in micrometers, an `Anatomy` gives the type of tissue, the distance to the edge of the
tissue and the atypia of the epithelium. The result depends only on the point and the seed, so that a slide
can be painted in pieces of any size. Nothing here is patient data.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import cv2
import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import norm


class Tissue(IntEnum):
    """Types of tissue. Tumor is no type of its own but epithelium with another architecture and atypia."""

    STROMA = 0
    LYMPHOID = 1
    MANTLE = 2
    GERMINAL = 3
    SINUS = 4
    ADIPOSE = 5
    BLOOD = 6
    EPITHELIUM = 7
    INFLAMED = 8
    CRUSHED = 9
    KERATIN = 10


@dataclass(frozen=True)
class SlideContent:
    """What one slide shows; a preset draws the content of each slide.

    Attributes:
        organ: "node", "lung" or "breast".
        tumor_share: Share of the tissue that lies in tumor foci, 0 to 1.
        architecture: Arrangement of the tumor cells: "nests", "glands", "solid" or "files".
        other: Second architecture of a mixed tumor; None = not mixed.
        other_share: Share of the tumor that has the second architecture.
        grade: Mean atypia of the tumor, 0 benign to 1 anaplastic.
        grade_spread: Half the range of the atypia between foci, for tumor foci and benign ones.
        patchiness: How much of a large focus looks benign: 0 nothing, 1 most of its rim, above 1 also parts
            of its core.
        mimic_share: Share of the tissue in foci of benign look-alikes.
        mimic_grade: Mean atypia of benign epithelium and of epithelioid histiocytes.
        density_contrast: How much denser tumor nuclei lie than those of look-alikes; 0 = no difference.
        tissue_share: Share of the slide that is tissue.
    """

    organ: str = "node"
    tumor_share: float = 0.0
    architecture: str = "nests"
    other: str | None = None
    other_share: float = 0.0
    grade: float = 0.6
    grade_spread: float = 0.15
    patchiness: float = 0.0
    mimic_share: float = 0.2
    mimic_grade: float = 0.15
    density_contrast: float = 0.0
    tissue_share: float = 0.6


MIMICS = ("epithelium", "histiocytes", "germinal", "inflamed", "crushed")
MIMIC_ODDS = {
    "node": (0.52, 0.22, 0.12, 0.07, 0.07),
    "lung": (0.4, 0.2, 0.1, 0.22, 0.08),
    "breast": (0.6, 0.1, 0.05, 0.17, 0.08),
}
MIMIC_ARCHITECTURE = {"lung": "glands", "breast": "ducts"}
"""Architecture of benign epithelium; in a node it is the architecture of the tumor."""

ARRANGEMENTS = {
    "nests": (-0.85, np.inf, np.inf),
    "glands": (-0.45, 0.75, np.inf),
    "ducts": (0.0, 0.95, np.inf),
    "solid": (-1.0, np.inf, 1.75),
    "files": (0.35, np.inf, np.inf),
}
"""Architecture -> values of a smooth random field above which there are cells, a lumen, and keratin."""

SMALLEST_FOCUS = 50_000.0
"""Mean area of the foci of a slide, um2, below which their number is reduced."""

CELLS = 16
"""Texels per wavelength of the noise texture."""


@lru_cache(maxsize=1)
def noise_texture() -> np.ndarray:
    """Seamless band-limited noise with zero mean, unit variance and a wavelength of 16 texels, (512, 512)."""
    side = 512
    white = np.random.default_rng(20250221).normal(size=(side, side))
    fx, fy = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))
    frequency = np.maximum(np.hypot(fx, fy), 1e-9) * CELLS
    band = np.exp(-0.5 * (np.log(frequency) / 0.45) ** 2)
    noise = np.fft.ifft2(np.fft.fft2(white) * band).real
    return (noise / noise.std()).astype(np.float32)


@lru_cache(maxsize=1)
def cell_texture() -> np.ndarray:
    """Seamless map of the distance to the walls between packed cells, in cell spacings, (512, 512)."""
    side, n = 512, 22
    rng = np.random.default_rng(7)
    seeds = (np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1) + rng.uniform(0.1, 0.9, (n, n, 2))) / n
    tiled = np.concatenate([seeds.reshape(-1, 2) + (i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)])
    points = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) / side
    distance = cKDTree(tiled).query(points, k=2)[0]
    return ((distance[:, 1] - distance[:, 0]) * n / 2).reshape(side, side).astype(np.float32)


def sample(texture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Look a texture up at (x, y) in texels: bilinear and periodic.

    The float32 grids x and y must span less than 2**15 texels, the limit of `cv2.remap`.
    """
    side = texture.shape[0]
    x, y = (a - np.float32(side * np.floor(a.flat[0] / side)) for a in (x, y))
    return cv2.remap(texture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


class Anatomy:
    """The tissue map of one slide.

    Args:
        content: What the slide shows.
        size: (width, height) in micrometers.
        seed: Seed of the whole map.
    """

    def __init__(self, content: SlideContent, size: tuple[float, float], seed: int):
        self.content, self.size = content, size
        rng = np.random.default_rng([seed, 1])
        self.offset = rng.uniform(0, 512, (32, 2)).astype(np.float32)
        self.pitch = 8.0 * np.ceil(max(size) / 15_000)
        width, height = (int(np.ceil(side / self.pitch)) + 2 for side in size)
        axes = (np.arange(width) - 0.5) * self.pitch, (np.arange(height) - 0.5) * self.pitch
        x, y = (grid.astype(np.float32) for grid in np.meshgrid(*axes))
        self.outline = self._outline(x, y, rng)
        self.vessels = self._discs(x, y, rng, density=2.2, radius=(14, 45), aspect=True)
        self.follicles = self._discs(x, y, rng, density=3.0, radius=(90, 200))
        self.mimic, self.mimic_id, n = self._foci(x, y, rng, content.mimic_share, 5.0)
        odds = MIMIC_ODDS[content.organ]
        self.mimic_kinds = rng.choice(len(MIMICS), size=n, p=odds).astype(np.uint8)
        self.mimic_grades = content.mimic_grade + content.grade_spread * rng.uniform(-1, 1, n)
        self.tumor, self.tumor_id, n = self._foci(x, y, rng, content.tumor_share, 1.2)
        self.tumor_grades = content.grade + content.grade_spread * rng.uniform(-1, 1, n)

    def noise(self, x: np.ndarray, y: np.ndarray, wavelength: float, index: int) -> np.ndarray:
        """Value of the smooth random field number `index` (unit variance) at points in micrometers."""
        dx, dy = self.offset[index]
        scale = np.float32(CELLS / wavelength)
        return sample(noise_texture(), x * scale + dx, y * scale + dy)

    def _outline(self, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Signed distance to the edge of the tissue in um, positive inside.

        The tissue covers the share of the slide that the content asks for.
        """
        width, height = self.size
        pieces = 2 if rng.uniform() < 0.25 else 1
        level = np.full(x.shape, -np.inf, np.float32)
        for piece in range(pieces):
            across = (piece + 0.5) / pieces
            cx, cy = width * (across + rng.normal(0, 0.02)), height * rng.normal(0.5, 0.02)
            rx, ry = 0.5 * width / pieces, 0.5 * height * rng.uniform(0.9, 1.0)
            wobble = 0.13 * self.noise(x, y, 0.9 * ry, 0) + 0.05 * self.noise(x, y, 0.3 * ry, 1)
            level = np.maximum(level, min(rx, ry) * (1 + wobble - np.hypot((x - cx) / rx, (y - cy) / ry)))
        edge = np.minimum.reduce([x, y, width - x, height - y]) - 25
        level = np.minimum(level, edge)
        return level - np.quantile(level, 1 - self.content.tissue_share)

    def _discs(
        self,
        x: np.ndarray,
        y: np.ndarray,
        rng: np.random.Generator,
        density: float,
        radius: tuple[float, float],
        aspect: bool = False,
    ) -> np.ndarray:
        """Scatter discs, or ellipses if `aspect`, over the slide.

        Their mean number per mm2 is `density`, their radii lie in the range `radius` (um).

        Returns:
            Signed distance to the edge of the nearest one in um, positive inside.
        """
        n = rng.poisson(density * self.size[0] * self.size[1] / 1e6)
        level = np.full(x.shape, -1e3, np.float32)
        index = np.zeros(x.shape, np.uint16)
        for i in range(n):
            cx, cy = rng.uniform(0, self.size[0]), rng.uniform(0, self.size[1])
            r, squash, turn = rng.uniform(*radius), rng.uniform(0.35, 1.0), rng.uniform(0, np.pi)
            self._raise(level, index, i, cx, cy, r, squash if aspect else 1.0, turn)
        return level

    def _raise(
        self,
        level: np.ndarray,
        index: np.ndarray,
        i: int,
        cx: float,
        cy: float,
        r: float,
        squash: float = 1.0,
        turn: float = 0.0,
    ) -> None:
        """Raise `level` to the signed distance to the edge of one ellipse, and mark it in `index`."""
        reach = 2.2 * r + 2 * self.pitch
        x0, x1 = (int(np.clip((cx + s * reach) / self.pitch, 0, level.shape[1])) for s in (-1, 1))
        y0, y1 = (int(np.clip((cy + s * reach) / self.pitch, 0, level.shape[0])) for s in (-1, 1))
        dx = ((np.arange(x0, x1) - 0.5) * self.pitch - cx)[None, :]
        dy = ((np.arange(y0, y1) - 0.5) * self.pitch - cy)[:, None]
        along, across = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
        new = (squash**0.5 * r - np.hypot(along * squash, across)).astype(np.float32)
        window = np.s_[y0:y1, x0:x1]
        index[window][new > level[window]] = i
        np.maximum(level[window], new, out=level[window])

    def _foci(
        self, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, share: float, density: float
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Draw irregular foci that together cover a share of the tissue; `density` is their number per mm2.

        Returns:
            Signed distance to the edge of a focus (um, positive inside), index of the nearest focus, and
            number of foci.
        """
        level = np.full(x.shape, -1e3, np.float32)
        index = np.zeros(x.shape, np.uint16)
        if share <= 0:
            return level, index, 0
        inside = self.outline > 0
        area = inside.sum() * self.pitch**2
        n = min(1 + rng.poisson(density * area / 1e6), max(1, int(share * area / SMALLEST_FOCUS)))
        spots = np.flatnonzero(self.outline > 60)
        spots = spots if len(spots) else np.flatnonzero(inside)
        weights = rng.dirichlet(np.full(n, 2.5))
        for i, weight in enumerate(weights):
            row, column = divmod(int(rng.choice(spots)), x.shape[1])
            r = np.sqrt(1.3 * weight * share * area / np.pi)
            where = (column - 0.5) * self.pitch, (row - 0.5) * self.pitch
            self._raise(level, index, i, *where, r, rng.uniform(0.45, 1.0), rng.uniform(0, np.pi))
        scale = float(np.sqrt(share * area / n / np.pi))
        ragged = 0.35 * scale * self.noise(x, y, 1.3 * scale, 2), 0.1 * scale * self.noise(x, y, 60, 3)
        uneven = level + ragged[0] + ragged[1]
        return uneven - np.quantile(uneven[inside], 1 - share), index, n

    def _layer(self, layer: np.ndarray, x: np.ndarray, y: np.ndarray, nearest: bool = False) -> np.ndarray:
        """Value of a map of the whole slide, such as `outline`, at points in micrometers."""
        u, v = (np.asarray(axis / self.pitch + 0.5, np.float32) for axis in (x, y))
        method = cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR
        return cv2.remap(layer, u, v, method, borderMode=cv2.BORDER_REPLICATE)

    def fibers(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Curved coordinates (u, v) in um: u runs along the collagen fibers, v across them."""
        u = x + 130 * self.noise(x, y, 520, 4) + 18 * self.noise(x, y, 110, 5)
        v = y + 130 * self.noise(x, y, 520, 6) + 18 * self.noise(x, y, 110, 7)
        return u, v

    def tumor_level(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance to the edge of the tumor in um, positive inside.

        Args:
            x: Horizontal positions in um, 2-D grid.
            y: Vertical positions in um, grid of the same shape.
        """
        wx, wy = self._warp(x, y)
        return np.minimum(self._layer(self.tumor, wx, wy), self._layer(self.outline, wx, wy) - 4)

    def _warp(self, x, y):
        """Move points by a few micrometers, so that borders that are smooth on the map become ragged."""
        return x + 7 * self.noise(x, y, 55, 8), y + 7 * self.noise(x, y, 55, 9)

    def at(self, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        """Tissue at a 2-D grid of points in micrometers.

        Returns:
            Grids by name: "tissue", the type as uint8 of `Tissue`; "level", the distance to the edge of the
            tissue in um, negative in glass, lumens and fat vacuoles; "atypia" of the epithelium, 0 to 1;
            "u" and "v", the fiber coordinates in um; "density", the relative density of nuclei.
        """
        wx, wy = self._warp(x, y)
        outline = self._layer(self.outline, wx, wy) + 3 * self.noise(x, y, 22, 10)
        u, v = self.fibers(x, y)
        tissue, level = getattr(self, f"_{self.content.organ}")(x, y, wx, wy, outline)
        atypia = np.full(x.shape, self.content.mimic_grade, np.float32)
        density = 1 + 0.12 * self.noise(x, y, 180, 11)

        mimic = self._layer(self.mimic, wx, wy)
        if self.content.mimic_share > 0:
            which = self._layer(self.mimic_id, wx, wy, nearest=True)
            kinds = np.where(mimic > 0, self.mimic_kinds[which], 255)
            level = np.where(mimic > 0, 50.0, level)
            atypia = np.where(mimic > 0, self.mimic_grades[which], atypia)
            tissue, level = self._mimics(kinds, mimic, tissue, level, x, y, u, v)
        if self.content.tumor_share > 0:
            tumor = self._layer(self.tumor, wx, wy)
            which = self._layer(self.tumor_id, wx, wy, nearest=True)
            inside = tumor > 0
            atypia = np.where(inside, self._tumor_atypia(x, y, tumor, which), atypia)
            density = np.where(inside, density * (1 + self.content.density_contrast), density)
            level = np.where(inside, 50.0, level)
            tissue, level = self._arrange(self.content.architecture, inside, tissue, level, x, y, u, v)
            if self.content.other:
                mixed = inside & (self.noise(x, y, 350, 31) < norm.ppf(self.content.other_share))
                level = np.where(mixed, 50.0, level)
                tissue, level = self._arrange(self.content.other, mixed, tissue, level, x, y, u, v)

        blood = self._layer(self.vessels, wx, wy)
        tissue = np.where(blood > -6, np.where(blood > 0, Tissue.BLOOD, Tissue.STROMA), tissue)
        level = np.where(blood > -6, 20.0, level)
        crack = np.abs(self.noise(x, y, 330, 13)) * 50 - 5 * (self.noise(x, y, 420, 14) - 1.1)
        level = np.minimum.reduce([level, outline, crack])
        return {
            "tissue": tissue.astype(np.uint8),
            "level": level.astype(np.float32),
            "atypia": np.clip(atypia, 0, 1).astype(np.float32),
            "u": u,
            "v": v,
            "density": np.clip(density, 0, 1.3).astype(np.float32),
        }

    def _tumor_atypia(self, x, y, depth, which):
        """Atypia of the tumor: high in the core of a focus, with benign-looking patches towards its rim."""
        content = self.content
        deepest = max(float(self.tumor.max()), 1.0)
        patchiness = content.patchiness * min(1.0, deepest / 100)
        bland = 0.9 - 1.6 * depth / deepest + 0.7 * self.noise(x, y, 220, 12)
        frank = np.clip(1 - patchiness * np.maximum(bland, 0), 0, 1)
        return content.mimic_grade + (self.tumor_grades[which] - content.mimic_grade) * frank

    def _arrange(self, architecture, inside, tissue, level, x, y, u, v):
        """Arrange epithelium as nests, glands, solid sheets or single files, with stroma in between."""
        cells, lumen, keratin = ARRANGEMENTS[architecture]
        if architecture == "files":
            field = self.noise(u * 0.28, v * 1.6, 60, 17)
        else:
            field = self.noise(x, y, 95, 15) + 0.3 * self.noise(x, y, 40, 16)
        new = np.where(field > cells, Tissue.EPITHELIUM, Tissue.STROMA)
        new = np.where(field > keratin, Tissue.KERATIN, new)
        if np.isfinite(lumen):
            level = np.where(inside, np.minimum(level, (lumen - field) * 16), level)
        return np.where(inside, new, tissue), level

    def _mimics(self, kinds, mimic, tissue, level, x, y, u, v):
        """Insert the benign foci: glands and nests, histiocytes, germinal centers, inflammation, crush."""
        architecture = MIMIC_ARCHITECTURE.get(self.content.organ, self.content.architecture)
        tissue, level = self._arrange(architecture, kinds == 0, tissue, level, x, y, u, v)
        tissue = np.where(kinds == 1, Tissue.SINUS, tissue)
        tissue = np.where(kinds == 2, np.where(mimic > 22, Tissue.GERMINAL, Tissue.MANTLE), tissue)
        tissue = np.where(kinds == 3, Tissue.INFLAMED, tissue)
        return np.where(kinds == 4, Tissue.CRUSHED, tissue), level

    def _adipose(self, x, y, cell, wall, index):
        """Level of packed vacuoles in um: positive only in their walls."""
        dx, dy = self.offset[index]
        scale = 512 / 22 / cell
        return wall - sample(cell_texture(), x * scale + dx, y * scale + dy) * cell

    def _node(self, x, y, wx, wy, outline):
        """Lymph node: fat and capsule, follicles in the cortex, sinuses and cords in the medulla.

        Returns:
            Type of tissue and level in um, as in `at`; the same holds for the other organs.
        """
        fat = (self.noise(x, y, 900, 18) - 0.55) * 120 - np.maximum(outline - 160, 0)
        depth = outline - np.maximum(fat + 110, 0)
        tissue = np.full(x.shape, Tissue.LYMPHOID)
        medulla = self.noise(x, y, 800, 19) + 0.35 * self.noise(x, y, 150, 20) > 0.45
        cords = self.noise(x, y, 75, 21) + 0.4 * self.noise(x, y, 32, 22)
        tissue[medulla & (cords > -0.1)] = Tissue.SINUS
        follicle = self._layer(self.follicles, wx, wy)
        tissue[(follicle > 0) & ~medulla] = Tissue.MANTLE
        tissue[(follicle > 32) & ~medulla] = Tissue.GERMINAL
        septum = np.abs(self.noise(x, y, 620, 23)) * 100 - 9 * (1 + self.noise(x, y, 300, 24))
        tissue[septum < 0] = Tissue.STROMA
        tissue[depth < 55 + 12 * self.noise(x, y, 120, 25)] = Tissue.SINUS
        tissue[depth < 30 + 9 * self.noise(x, y, 200, 26)] = Tissue.STROMA
        tissue[fat > 0] = Tissue.ADIPOSE
        return tissue, np.where(fat > 0, self._adipose(x, y, 75, 1.3, 27), 50.0)

    def _lung(self, x, y, wx, wy, outline):
        """Lung: air spaces between thin septa, bronchovascular stroma, scattered lymphoid tissue."""
        solid = self.noise(x, y, 650, 18) + 0.3 * self.noise(x, y, 160, 19)
        tissue = np.full(x.shape, Tissue.STROMA)
        tissue[solid > 1.5] = Tissue.LYMPHOID
        wall = 5 + 2.5 * self.noise(x, y, 60, 20) + 30 * np.maximum(solid - 0.5, 0)
        airy = self._adipose(x, y, 170, 0, 27) + wall
        tissue[(airy > 0) & (solid < 0.2) & (self.noise(x, y, 90, 21) > 0.9)] = Tissue.SINUS
        return tissue, np.where(solid < 0.7, airy, 50.0)

    def _breast(self, x, y, wx, wy, outline):
        """Breast: dense collagen with lobules and ducts, and fat."""
        fat = (self.noise(x, y, 700, 18) - 0.35) * 110
        tissue = np.full(x.shape, Tissue.STROMA)
        tissue[fat > 0] = Tissue.ADIPOSE
        lobule = self._layer(self.follicles, wx, wy) > 0
        acini = self.noise(x, y, 48, 21)
        tissue[lobule & (acini > 0.15)] = Tissue.EPITHELIUM
        level = np.where(fat > 0, self._adipose(x, y, 85, 1.3, 27), 50.0)
        return tissue, np.where(lobule, np.minimum(50.0, (1.25 - acini) * 8), level)
