"""The painter of synthetic H&E: turns an `Anatomy` into strips of RGB rows.

It paints in optical density: tissue textures and stamped nuclei add hematoxylin and eosin, the stain matrix
of the slide turns them into absorbance (Beer-Lambert), and the scanner of the slide adds white balance, blur
and noise. Cells of 512 x 512 pixels are painted one by one and depend only on the seed and their position, so
that neither memory nor picture depends on the height of the strips.

These pictures are synthetic. They serve to teach and to test software and are no evidence about any disease.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from scipy.spatial import cKDTree

from hdmil_lib.synthetic.anatomy import Anatomy, SlideContent, Tissue
from hdmil_lib.synthetic.nuclei import GRADES, KINDS, epithelial, lattice, render

CELL = 512
"""Side of the square that is painted at once, in pixels."""

STEP = 4
"""Pixels between the points of the tissue map."""

BASOPHILIA = 0.11
"""Hematoxylin density that the cytoplasm of anaplastic cells adds."""

TEXTURE, TEXTURE_MPP = 1024, 0.5
"""Side of the seamless textures in pixels, and micrometers per pixel of the collagen."""

PITCHES = (5.6, 9.4, 14.0)
"""Distances between small, medium and large nuclei, um: one lattice for each."""

LOOKS = {
    Tissue.STROMA: (0.05, 0.55, 0.42, 0.08),
    Tissue.LYMPHOID: (0.20, 0.26, 0.12, 0.30),
    Tissue.MANTLE: (0.24, 0.24, 0.10, 0.40),
    Tissue.GERMINAL: (0.20, 0.38, 0.10, 0.35),
    Tissue.SINUS: (0.10, 0.36, 0.16, 0.30),
    Tissue.ADIPOSE: (0.04, 0.42, 0.10, 0.10),
    Tissue.BLOOD: (0.01, 0.18, 0.00, 0.20),
    Tissue.EPITHELIUM: (0.17, 0.45, 0.06, 0.30),
    Tissue.INFLAMED: (0.12, 0.42, 0.30, 0.35),
    Tissue.CRUSHED: (0.40, 0.45, 0.50, 0.30),
    Tissue.KERATIN: (0.04, 0.95, 0.25, 0.12),
}
"""Tissue -> base density of hematoxylin and of eosin, contrast of the collagen, contrast of the grain."""

CROWDS: dict[Tissue, tuple[dict[str, float], dict[str, float], dict[str, float]]] = {
    Tissue.STROMA: ({"lymphocyte": 0.012}, {"spindle": 0.13}, {"spindle": 0.08}),
    Tissue.LYMPHOID: ({"lymphocyte": 0.9}, {"histiocyte": 0.04}, {"centroblast": 0.03}),
    Tissue.MANTLE: ({"lymphocyte": 0.93}, {}, {}),
    Tissue.GERMINAL: ({"lymphocyte": 0.16}, {"centroblast": 0.78}, {}),
    Tissue.SINUS: ({"lymphocyte": 0.13}, {"histiocyte": 0.58}, {}),
    Tissue.ADIPOSE: ({}, {"spindle": 0.22}, {}),
    Tissue.BLOOD: ({"erythrocyte": 0.8, "lymphocyte": 0.012}, {}, {}),
    Tissue.EPITHELIUM: ({"lymphocyte": 0.03}, {"epithelial": 0.85}, {"epithelial": 0.9}),
    Tissue.INFLAMED: ({"lymphocyte": 0.40, "plasma": 0.18}, {"histiocyte": 0.12, "spindle": 0.12}, {}),
    Tissue.CRUSHED: ({"crushed": 0.45, "lymphocyte": 0.2}, {"crushed": 0.4}, {}),
    Tissue.KERATIN: ({}, {"epithelial": 0.06}, {}),
}
"""Tissue -> for each lattice of `PITCHES`, the probability of each kind of nucleus at a lattice point."""

NAMES = (*KINDS, "epithelial")
ALIGNED = (NAMES.index("spindle"), NAMES.index("crushed"))
"""Kinds of nuclei that lie along the fibers."""

NOTHING = -1
"""Kind of a lattice point without a nucleus."""

AREA_KEYS = ("tissue", "level", "atypia", "density")


@dataclass(frozen=True)
class Scanner:
    """Stain and scanner of one slide.

    Attributes:
        stains: Absorbance of hematoxylin and eosin in R, G, B, float32 (2, 3).
        white: Level of empty glass in R, G, B, 0 to 255, float32 (3,).
        blur: Standard deviation of the point spread in pixels.
        noise: Standard deviation of the sensor noise in gray levels.
    """

    stains: np.ndarray
    white: np.ndarray
    blur: float
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator, jitter: float) -> "Scanner":
        """Draw stain and scanner: a jitter of 0 always gives the same, 1 the spread between hospitals."""
        stains = np.array([[0.56, 0.72, 0.41], [0.18, 0.83, 0.50]])
        stains = np.clip(stains + jitter * rng.normal(0, [[0.06, 0.03, 0.05], [0.05, 0.03, 0.07]]), 0.02, 1)
        stains /= np.linalg.norm(stains, axis=1, keepdims=True)
        stains *= np.exp(jitter * rng.normal(0, 0.16, (2, 1))) * np.exp(jitter * rng.normal(0, 0.08))
        white = 255 * np.clip(0.955 + jitter * (rng.normal(0, 0.012) + rng.normal(0, 0.008, 3)), 0.85, 1)
        blur = 0.55 + 0.3 * jitter * rng.uniform(-1, 1)
        noise = 1.2 + jitter * rng.uniform(0, 1.2)
        return cls(stains.astype(np.float32), white.astype(np.float32), blur, noise)


@lru_cache(maxsize=4)
def texture(along: float, across: float, channel: int) -> np.ndarray:
    """Seamless noise with the given correlation lengths in pixels, float32 (TEXTURE, TEXTURE)."""
    white = np.random.default_rng([11, channel]).normal(size=(TEXTURE, TEXTURE))
    fx, fy = np.meshgrid(np.fft.fftfreq(TEXTURE), np.fft.fftfreq(TEXTURE))
    band = np.exp(-0.5 * ((fx * along) ** 2 + (fy * across) ** 2) * 4)
    noise = np.fft.ifft2(np.fft.fft2(white) * band).real
    return (noise / noise.std()).astype(np.float32)


def collagen() -> np.ndarray:
    """Texture of collagen: fiber bundles along x with single fibrils, and pale clefts between them."""
    bundles, fibrils = texture(70, 5, 0), texture(50, 2.0, 1)
    clefts = np.maximum(-bundles - 1.2, 0)
    return np.clip(0.6 * bundles + 0.6 * fibrils - 0.3 * clefts, -1.7, 2).astype(np.float32)


def grain() -> np.ndarray:
    """Texture of granular cytoplasm."""
    return (0.8 * texture(7, 7, 2) + 0.5 * texture(2.2, 2.2, 3)).astype(np.float32)


def window(tile: np.ndarray, x: int, y: int) -> np.ndarray:
    """Part of a seamless texture that covers a cell and its margin."""
    x, y = x % TEXTURE, y % TEXTURE
    return tile[y : y + CELL + 2 * STEP, x : x + CELL + 2 * STEP]


class Painter:
    """Paints one synthetic slide on demand.

    Args:
        content: What the slide shows.
        width: Width in pixels.
        height: Height in pixels.
        mpp: Micrometers per pixel.
        seed: Seed of every pixel.
        stain_jitter: Spread of stain and scanner between slides; see `Scanner.draw`.
    """

    def __init__(
        self, content: SlideContent, width: int, height: int, mpp: float, seed: int, stain_jitter: float = 1.0
    ):
        self.width, self.height, self.mpp = width, height, mpp
        self.anatomy = Anatomy(content, (width * mpp, height * mpp), seed)
        rng = np.random.default_rng([seed, 2])
        self.scanner = Scanner.draw(rng, stain_jitter)
        kinds = [*KINDS.values(), *(epithelial(i / (GRADES - 1)) for i in range(GRADES))]
        self.bank = [render(kind, mpp, rng) for kind in kinds]
        reach = max(stamps.shape[1] // 2 for stamps in self.bank)
        self.halo = STEP * (2 + reach // STEP)  # nuclei so many pixels away may reach into a cell
        self.radii = np.array([kind.radius * kind.aspect**0.5 for kind in kinds] + [0.0], np.float32)
        self.keys = [int(key) for key in rng.integers(1 << 62, size=len(PITCHES))]
        self.looks = np.array([LOOKS[t] for t in Tissue], np.float32)
        self.crowds = np.array(
            [[np.cumsum([c.get(k, 0) for k in NAMES]) for c in CROWDS[t]] for t in Tissue], np.float32
        )
        self.collagen, self.grain = collagen(), np.pad(grain(), STEP, mode="wrap")
        self.noise = np.random.default_rng(5).normal(0, 1, (TEXTURE, TEXTURE, 3)).astype(np.float32)

    def strips(self, height: int = CELL) -> Iterator[np.ndarray]:
        """Paint the slide as consecutive blocks of rows, uint8 (`height` or fewer, width, 3)."""
        pending = np.empty((0, self.width, 3), np.uint8)
        for y in range(0, self.height, CELL):
            row = np.concatenate([self._cell(x, y) for x in range(0, self.width, CELL)], axis=1)
            pending = np.concatenate([pending, row[: self.height - y, : self.width]])
            while len(pending) >= height:
                yield pending[:height]
                pending = pending[height:]
        if len(pending):
            yield pending

    def truth(self, mpp: float = 8.0) -> np.ndarray:
        """Tumor mask with `mpp` um per pixel, bool (rows, columns), sizes rounded up.

        A pixel counts as tumor if at least half of its sample points do.
        """
        rows, columns = (int(np.ceil(side * self.mpp / mpp)) for side in (self.height, self.width))
        mask = np.zeros((rows, columns), bool)
        if self.anatomy.content.tumor_share <= 0:
            return mask
        x = (np.arange(2 * columns) + 0.5) * mpp / 2
        for top in range(0, rows, 256):
            n = min(256, rows - top)
            y = (2 * top + np.arange(2 * n) + 0.5) * mpp / 2
            inside = self.anatomy.tumor_level(*np.meshgrid(x.astype(np.float32), y.astype(np.float32))) > 0
            mask[top : top + n] = inside.reshape(n, 2, columns, 2).mean((1, 3)) >= 0.5
        return mask

    def _cell(self, x0: int, y0: int) -> np.ndarray:
        """Paint the cell with its corner at (x0, y0), uint8 (CELL, CELL, 3)."""
        points = np.arange((CELL + 2 * self.halo) // STEP) * STEP + STEP / 2 - self.halo
        across, down = (((start + points) * self.mpp).astype(np.float32) for start in (x0, y0))
        x, y = np.meshgrid(across, down)
        area = self.anatomy.at(x, y)
        side = CELL + 2 * STEP
        if area["level"].max() < -2:
            density = np.zeros((side, side, 2), np.float32)
        else:
            density = self._ground(area, x0, y0) + self._nuclei(area, x0, y0)
        return self._scan(np.maximum(density, 0), x0, y0)

    def _ground(self, area: dict[str, np.ndarray], x0: int, y0: int) -> np.ndarray:
        """Density of hematoxylin and eosin in the tissue around the nuclei, with a margin of STEP pixels."""
        margin = self.halo // STEP - 2

        def enlarge(values: np.ndarray) -> np.ndarray:
            values = values[margin:-margin, margin:-margin]
            large = cv2.resize(values, None, fx=STEP, fy=STEP, interpolation=cv2.INTER_LINEAR)
            return large[STEP:-STEP, STEP:-STEP]

        looks = self.looks[area["tissue"]]
        looks[..., 0] += BASOPHILIA * area["atypia"] * (area["tissue"] == Tissue.EPITHELIUM)
        looks = enlarge(cv2.blur(looks, (3, 3)))
        u, v = (enlarge(area[axis] / np.float32(TEXTURE_MPP)) for axis in "uv")
        u, v = (a - np.float32(TEXTURE * np.floor(a[0, 0] / TEXTURE)) for a in (u, v))
        fibers = cv2.remap(self.collagen, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        grain = window(self.grain, x0, y0)
        inside = np.clip(enlarge(area["level"]) / 1.6 + 0.5 + 0.2 * grain, 0, 1)
        inside *= 1 + looks[..., 3] * grain
        hematoxylin = inside * looks[..., 0]
        eosin = inside * looks[..., 1] * np.maximum(1 + looks[..., 2] * fibers, 0.12)
        return cv2.merge([hematoxylin, eosin])

    def _nuclei(self, area: dict[str, np.ndarray], x0: int, y0: int) -> np.ndarray:
        """Density of hematoxylin and eosin in the stamped nuclei, with a margin of STEP pixels."""
        halo = self.halo
        canvas = np.zeros((CELL + 4 * halo, CELL + 4 * halo, 2), np.float32)
        box = tuple(np.array([x0 - halo, y0 - halo, x0 + CELL + halo, y0 + CELL + halo]) * self.mpp)
        rise_y, rise_x = np.gradient(area["v"])
        direction = np.mod(np.arctan2(-rise_x, rise_y), np.pi) / np.pi
        taken = np.empty((0, 3), np.float32)
        for number in (2, 1, 0):
            x, y, pick, vary, turn, chance = lattice(box, PITCHES[number], self.keys[number])
            px, py = x / self.mpp - x0 + halo, y / self.mpp - y0 + halo
            at = tuple(np.minimum(a / STEP, len(direction) - 1).astype(int) for a in (py, px))
            kind = self._kinds(number, pick, vary, chance, *(area[k][at] for k in AREA_KEYS))
            radius = self.radii[kind]
            if len(taken):
                distance, near = cKDTree(taken[:, :2]).query(np.stack([x, y], 1), distance_upper_bound=14)
                reach = np.append(taken[:, 2], 0)[near] + radius
                kind[distance < 0.85 * reach] = NOTHING
            present = kind != NOTHING
            taken = np.concatenate([taken, np.stack([x, y, radius], 1)[present]])
            along = np.isin(kind, ALIGNED)
            angle = np.where(along, np.mod(direction[at] + 0.12 * (turn - 0.5), 1), turn)
            for k, a, cx, cy in zip(*(v[present].tolist() for v in (kind, angle, px, py)), strict=True):
                stamps = self.bank[k]
                half = stamps.shape[1] // 2
                left, top = int(cx) + halo - half, int(cy) + halo - half
                canvas[top : top + 2 * half + 1, left : left + 2 * half + 1] += stamps[int(a * len(stamps))]
        edge = 2 * halo - STEP
        return canvas[edge:-edge, edge:-edge]

    def _kinds(
        self,
        number: int,
        pick: np.ndarray,
        vary: np.ndarray,
        chance: np.ndarray,
        tissue: np.ndarray,
        level: np.ndarray,
        atypia: np.ndarray,
        density: np.ndarray,
    ) -> np.ndarray:
        """Kind of nucleus at each point of lattice `number`: an index into the bank, or NOTHING.

        The more atypical the epithelium, the more of its nuclei come from the lattice of large nuclei.
        """
        crowd = self.crowds[tissue, number]
        graded = (1.0, 1 - 0.75 * atypia, atypia)[number]
        crowd[:, -1] = crowd[:, -2] + (crowd[:, -1] - crowd[:, -2]) * graded
        name = (pick[:, None] >= crowd * density[:, None]).sum(1)
        own = np.clip(atypia + (0.05 + 0.25 * atypia) * (2 * vary - 1), 0, 1)
        kind = np.where(name == len(KINDS), len(KINDS) + np.rint(own * (GRADES - 1)).astype(int), name)
        kind[(level < 1) | (name == len(NAMES))] = NOTHING
        if number == 2:
            kind[(level < -40) & (chance < 0.003)] = NAMES.index("debris")
        return kind

    def _scan(self, density: np.ndarray, x0: int, y0: int) -> np.ndarray:
        """Turn densities into the RGB of the scanner, without the margin."""
        scanner = self.scanner
        mixing = np.concatenate([-scanner.stains.T, np.log(scanner.white)[:, None]], axis=1)
        light = cv2.exp(cv2.transform(density, mixing))
        light = cv2.GaussianBlur(light, (0, 0), scanner.blur)[STEP:-STEP, STEP:-STEP]
        x, y = (int(start * 0.618) % (TEXTURE - CELL) for start in (x0 + y0, x0 + 3 * y0))
        return cv2.convertScaleAbs(cv2.scaleAdd(self.noise[y : y + CELL, x : x + CELL], scanner.noise, light))
