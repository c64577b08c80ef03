"""Nuclei and other objects of cell size for synthetic H&E: rendered once per slide, stamped many times.

A stamp holds optical density, not color: channel 0 is hematoxylin, channel 1 is eosin (negative where a
nucleus displaces the cytoplasm). Positions come from jittered hexagonal lattices. Their random numbers are
hashes of the lattice index, so that any part of a slide can be drawn alone and fits its neighbors.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np


@dataclass(frozen=True)
class NucleusKind:
    """Appearance of one type of cell. Lengths are in micrometers, densities in units of optical density.

    Attributes:
        radius: Mean radius of the nucleus.
        spread: Relative standard deviation of the radius.
        aspect: Mean ratio of the short axis to the long axis.
        irregularity: Amplitude of the waves of the outline, relative to the radius.
        darkness: Hematoxylin density.
        contrast: Relative standard deviation of the darkness between nuclei.
        vesicle: How vesicular the nucleus is: 0 evenly filled, 1 a pale center inside a dark rim.
        clumps: Amplitude of the chromatin texture.
        nucleolus: Probability of visible nucleoli.
        cytoplasm: Width of the cytoplasm around the nucleus; 0 = none visible.
        eosin: Eosin density of the cytoplasm; a negative value gives a pale halo.
    """

    radius: float
    spread: float = 0.08
    aspect: float = 0.9
    irregularity: float = 0.04
    darkness: float = 1.6
    contrast: float = 0.1
    vesicle: float = 0.2
    clumps: float = 0.35
    nucleolus: float = 0.0
    cytoplasm: float = 0.0
    eosin: float = 0.0


KINDS: dict[str, NucleusKind] = {
    "lymphocyte": NucleusKind(2.9, 0.09, 0.92, 0.05, 2.0, 0.12, 0.15, 0.45, 0.0, 0.8, -0.12),
    "plasma": NucleusKind(2.9, 0.08, 0.9, 0.03, 1.8, 0.1, 0.35, 0.7, 0.0, 3.2, 0.22),
    "centroblast": NucleusKind(4.3, 0.14, 0.85, 0.09, 1.15, 0.16, 0.6, 0.4, 0.5, 1.2, 0.05),
    "histiocyte": NucleusKind(4.0, 0.13, 0.7, 0.08, 1.0, 0.15, 0.6, 0.3, 0.2, 4.0, 0.12),
    "spindle": NucleusKind(3.6, 0.2, 0.24, 0.05, 1.5, 0.2, 0.1, 0.3),
    "crushed": NucleusKind(4.0, 0.35, 0.3, 0.3, 2.1, 0.25, 0.0, 0.1),
    "erythrocyte": NucleusKind(3.1, 0.08, 0.93, 0.03, 0.0, 0.0, 0.0, 0.0, 0.0, 0.35, 1.15),
    "debris": NucleusKind(3.0, 0.7, 0.5, 0.4, 0.7, 0.6, 0.0, 0.5, 0.0, 2.0, 0.35),
}
BENIGN = NucleusKind(3.7, 0.06, 0.85, 0.03, 1.3, 0.08, 0.45, 0.35, 0.15, 3.0, 0.16)
ANAPLASTIC = NucleusKind(7.2, 0.22, 0.8, 0.13, 1.4, 0.3, 0.75, 0.7, 1.0, 3.6, 0.2)
GRADES = 9
"""Number of steps between a benign and an anaplastic epithelial nucleus."""


def epithelial(atypia: float) -> NucleusKind:
    """Interpolate an epithelial nucleus between benign (atypia 0) and anaplastic (atypia 1)."""
    mixed = {k: (1 - atypia) * getattr(BENIGN, k) + atypia * getattr(ANAPLASTIC, k) for k in vars(BENIGN)}
    return replace(BENIGN, **mixed)


def render(kind: NucleusKind, mpp: float, rng: np.random.Generator, n: int = 48) -> np.ndarray:
    """Draw stamps of one kind of nucleus.

    Args:
        kind: Appearance of the nuclei.
        mpp: Micrometers per pixel.
        rng: Source of the random numbers.
        n: Number of stamps.

    Returns:
        Densities of hematoxylin and eosin, float32 (n, side, side, 2). The angles of the nuclei rise evenly
        from 0 to pi.
    """
    radius = kind.radius * np.clip(rng.normal(1, kind.spread, n), 0.5, 1.7)
    aspect = np.clip(kind.aspect * rng.normal(1, 0.1, n), 0.15, 1.0)
    long, short = radius / np.sqrt(aspect), radius * np.sqrt(aspect)
    reach = min(float(long.max()) * (1 + kind.irregularity) + kind.cytoplasm + 1.0, 14.0)
    half = int(np.ceil(reach / mpp))
    axis = (np.arange(-half, half + 1) * mpp).astype(np.float32)
    angle = np.pi * (np.arange(n) + rng.uniform(0, 1, n)) / n

    def column(values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.float32)[:, None, None]

    cos, sin = column(np.cos(angle)), column(np.sin(angle))
    x, y = axis[None, None, :], axis[None, :, None]
    along, across = (x * cos + y * sin) / column(long), (y * cos - x * sin) / column(short)
    polar = np.arctan2(across, along)
    outline = 1.0
    for waves in (2, 3, 4, 5):
        amplitude = column(rng.normal(0, kind.irregularity / waves**0.5, n))
        outline = outline + amplitude * np.cos(waves * polar + column(rng.uniform(0, 6.3, n)))
    depth = (outline - np.hypot(along, across)) * column(short)  # um inside the outline, roughly

    inside = np.clip(0.5 + depth / 0.8, 0, 1)
    rim = np.exp(-(((depth - 0.4) / 0.55) ** 2))
    chromatin = rng.normal(0, 1, (n, *depth.shape[1:])).astype(np.float32)
    sigma = 0.55 / mpp
    chromatin = np.stack([cv2.GaussianBlur(c, (0, 0), sigma) for c in chromatin]) * (
        2 * np.sqrt(np.pi) * sigma
    )
    filled = 1 - 0.6 * kind.vesicle * (1 - rim) + 0.35 * kind.clumps * chromatin
    for _ in range(2):
        present = rng.uniform(0, 1, n) < kind.nucleolus
        away = rng.uniform(0, 0.4, n) * radius
        turn = rng.uniform(0, 6.3, n)
        size = np.clip(0.2 * radius * rng.normal(1, 0.2, n), 0.4, 1.6)
        distance2 = (x - column(away * np.cos(turn))) ** 2 + (y - column(away * np.sin(turn))) ** 2
        filled = filled + column(1.1 * present) * np.exp(-distance2 / column(size) ** 2 / 1.2)
    dark = column(kind.darkness * np.clip(rng.normal(1, kind.contrast, n), 0.45, 1.9))
    hematoxylin = dark * inside * np.clip(filled, 0.1, 2.2)

    body = np.clip(0.5 + (depth + kind.cytoplasm) / 1.2, 0, 1) if kind.cytoplasm else inside
    eosin = kind.eosin * body * (1 - inside) - 0.25 * inside * (kind.darkness > 0)
    if kind.darkness == 0:
        eosin = kind.eosin * inside * (1 - 0.35 * np.clip(depth / radius.mean(), 0, 1))
    return np.stack([hematoxylin, eosin], axis=-1).astype(np.float32)


def hashed(ix: np.ndarray, iy: np.ndarray, key: int) -> np.ndarray:
    """Hash each lattice point and the key to four uniform numbers in [0, 1), float32 (4, n)."""
    mask = (1 << 64) - 1
    with np.errstate(over="ignore"):
        z = ix.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key & mask)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
            z = z + iy.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        z = (z ^ (z >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(29)
    return (
        np.stack([(z >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]).astype(np.float32) / 65536
    )


def lattice(box: tuple[float, float, float, float], pitch: float, key: int) -> np.ndarray:
    """Points of a jittered hexagonal lattice inside a box.

    Args:
        box: (x0, y0, x1, y1), in the unit of the pitch.
        pitch: Distance between lattice points.
        key: Key of the random numbers; see `hashed`.

    Returns:
        float32 (6, n). Rows: x and y in the unit of the box, and four uniform numbers for each point.
    """
    x0, y0, x1, y1 = box
    rise = pitch * 0.866
    ix = np.arange(int(np.floor(x0 / pitch)) - 1, int(np.ceil(x1 / pitch)) + 2)
    iy = np.arange(int(np.floor(y0 / rise)) - 1, int(np.ceil(y1 / rise)) + 2)
    ix, iy = (grid.ravel() for grid in np.meshgrid(ix, iy))
    place, other = hashed(ix, iy, key), hashed(ix, iy, key ^ 0x5DEECE66D)
    x = (ix + 0.5 * (iy & 1) + 0.6 * (place[0] - 0.5)) * pitch
    y = (iy + 0.6 * (place[1] - 0.5)) * rise
    keep = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    return np.stack([x, y, *other])[:, keep].astype(np.float32)
