"""Two-stage inference: LIPN says which tiles matter, only those are read and encoded, DMIN classifies."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from hdmil_lib.errors import BagError, CheckpointError, SlideError
from hdmil_lib.features.bagstore import Bag
from hdmil_lib.features.encoders import Encoder, load_encoder
from hdmil_lib.features.extraction import encode_tiles
from hdmil_lib.inference.anytime import BLOCK, AnytimeStep, Trajectory, read_until, trajectory
from hdmil_lib.inference.checkpoint import ModelConfig, read_model, write_model
from hdmil_lib.inference.prescreen import prescreen as select_tiles
from hdmil_lib.inference.stages import stage
from hdmil_lib.models import DMIN, LIPN
from hdmil_lib.models.lipn import PATCH_SIZE
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.training.crossval import load_fold
from hdmil_lib.training.two_stage import Threshold


@dataclass(frozen=True, eq=False)
class Prediction:
    """What HDMIL says about one slide of N tiles and C classes; row i is the same tile in every array.

    Attributes:
        slide_id: The slide's name.
        classes: Class names, in the order of the probabilities and branches.
        probabilities: (C,).
        coords: Level-0 (x, y) of the tiles' top-left corners, int64 (N, 2).
        shape: (rows, cols) of the tile grid.
        rowcol: Position of the tiles on the grid, int64 (N, 2).
        attention: DMIN's attention logits, a column a branch, float32 (N, C); nan where a tile was not read.
        kept: Tiles kept for at least one branch, bool (N,).
        mask: Tiles kept for each branch, bool (N, C): LIPN's choice of what to read or, where all tiles were
            read, DMIN's choice of what to pool.
        seconds: Wall time of each stage: thumbnail, lipn, crop, features, dmin, and total.
        thumbnail: The slide at 8 um/px, uint8 (H, W, 3). Predicted from a bag it is put together from the
            patches, and the grid starts at the first tissue.
        broken: Rows of tiles that were to be read and could not be, int64; the others decided.
    """

    slide_id: str
    classes: tuple[str, ...]
    probabilities: np.ndarray
    coords: np.ndarray
    shape: tuple[int, int]
    rowcol: np.ndarray
    attention: np.ndarray
    kept: np.ndarray
    mask: np.ndarray
    seconds: dict[str, float]
    thumbnail: np.ndarray
    broken: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def n_tiles(self) -> int:
        """Number of tiles with tissue, N."""
        return len(self.coords)

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[int(self.probabilities.argmax())]

    @property
    def keep_ratio(self) -> float:
        """Share of the tiles that are kept for at least one branch."""
        return float(self.kept.mean())

    @property
    def n_read(self) -> int:
        """Number of tiles that were read and encoded."""
        return int((~np.isnan(self.attention[:, 0])).sum())


class Predictor:
    """DMIN, LIPN and the encoder they were trained on, from a slide file to a prediction.

    With LIPN this is the paper's HDMIL, except that DMIN selects by itself among the tiles that LIPN lets it
    read (see `two_stage`); `prescreen=False` reads every tile, which is its HDMIL†.

    Attributes:
        dmin: The classifier, in evaluation mode.
        lipn: The pre-screening network in evaluation mode, or None where none was trained.
        config: Classes, thresholds and encoder.
    """

    def __init__(self, dmin: DMIN, lipn: LIPN | None, config: ModelConfig, *, encoder: Encoder | None = None):
        """Put trained networks together.

        Args:
            dmin: The classifier.
            lipn: The pre-screening network.
            config: What the networks were trained for; its encoder is loaded at the first slide.
            encoder: An encoder already loaded.

        Raises:
            CheckpointError: The encoder is not the one that the networks were trained on.
        """
        self.dmin = dmin.eval()
        self.lipn = lipn.eval() if lipn is not None else None
        self.config = config
        self._encoder = self._checked(encoder) if encoder is not None else None

    @classmethod
    def load(cls, model_dir: str | Path, encoder: Encoder | None = None) -> "Predictor":
        """Read a model folder.

        Args:
            model_dir: Folder with `config.json`, `dmin.safetensors` and, for pre-screening,
                `lipn.safetensors`.
            encoder: An encoder already loaded; by default the model's own is loaded at the first slide.

        Raises:
            CheckpointError: The folder is incomplete or damaged, its files do not belong together, or it was
                trained on another encoder.
        """
        return cls(*read_model(model_dir), encoder=encoder)

    @classmethod
    def from_fold(
        cls,
        run_dir: str | Path,
        fold: int,
        classes: Sequence[str],
        bag: Bag,
        encoder: Encoder | None = None,
        *,
        method: str = "hdmil",
    ) -> "Predictor":
        """Take the networks of one fold of a cross-validation.

        Args:
            run_dir: Folder that `run_crossval` wrote.
            fold: Index of the fold.
            classes: The cohort's class names.
            bag: Any bag of the cohort, which says what encoder the networks were trained on.
            encoder: An encoder already loaded.
            method: Whose networks; see `load_fold`.

        Raises:
            CheckpointError: The method was not trained on that fold, or `encoder` is another one.
        """
        dmin, lipn, thresholds = load_fold(run_dir, fold, method)
        config = ModelConfig(tuple(classes), bag.attrs["encoder"], bag.attrs["weights_hash"], thresholds)
        return cls(dmin, lipn, config, encoder=encoder)

    def with_rules(self, *, thresholds: Threshold | None = None, margin: float | None = None) -> "Predictor":
        """The same networks with other rules; what is None stays.

        Args:
            thresholds: On LIPN's sigmoid, one number or one a branch.
            margin: At which `anytime` stops; infinite to read everything.
        """
        config = self.config
        if thresholds is not None:
            each = np.broadcast_to(thresholds, self.dmin.n_classes)
            config = replace(config, thresholds=tuple(each.astype(float).tolist()))
        if margin is not None:
            config = replace(config, margin=None if margin == math.inf else margin)
        return Predictor(self.dmin, self.lipn, config, encoder=self._encoder)

    def save(self, model_dir: str | Path) -> None:
        """Write the model folder that `load` reads."""
        write_model(model_dir, self.dmin, self.lipn, self.config)

    @property
    def encoder(self) -> Encoder:
        """The encoder, loaded when first needed.

        Raises:
            CheckpointError: The encoder of this name has other weights than in training.
        """
        if self._encoder is None:
            self._encoder = self._checked(load_encoder(self.config.encoder))
        return self._encoder

    def predict(
        self,
        slide_path: str | Path,
        *,
        prescreen: bool = True,
        mpp: float | tuple[float, float] | None = None,
        n_readers: int = 2,
        strict: bool = False,
        progress: bool = False,
    ) -> Prediction:
        """Classify a slide file; tiles that LIPN drops are never read at tile resolution.

        A damaged tile is left out and stands in `Prediction.broken`, unless `strict`.

        Args:
            slide_path: The slide.
            prescreen: Let LIPN choose the tiles to read; otherwise all are read.
            mpp: Micrometres per level-0 pixel, where the file does not say or is wrong.
            n_readers: Threads that read ahead while the encoder runs; with 0 the stages' seconds add up.
            strict: A tile that cannot be read is an error.
            progress: Show a bar over the tiles.

        Raises:
            SlideError: The slide cannot be read, has no scale, is smaller than a tile or has no tissue; a
                tile, or with `strict=False` every tile, is damaged.
            CheckpointError: Pre-screening is asked of a model without LIPN, or the encoder has changed.
        """
        encoder = self.encoder
        seconds: dict[str, float] = {}
        with stage(seconds, "total"), Slide(slide_path, mpp) as slide:
            with stage(seconds, "thumbnail"):
                grid = TileGrid.from_slide(slide)
            mask = self._screen(grid.patches, seconds) if prescreen else None
            rows = _rows_to_read(mask, len(grid))
            options = dict(n_readers=n_readers, strict=strict, seconds=seconds, progress=progress)
            features = encode_tiles(slide, grid, rows, encoder, **options)
            whole = ~np.isnan(features).all(axis=1)
            if not whole.any():
                raise SlideError(f"{slide.path}: none of the {len(rows)} tiles to read can be read")
            result = self._classify(features[whole], rows[whole], mask, len(grid), seconds)
        return Prediction(
            broken=rows[~whole],
            slide_id=slide.name,
            coords=grid.coords,
            shape=grid.shape,
            rowcol=grid.rowcol,
            thumbnail=grid.thumbnail,
            seconds=seconds,
            classes=self.config.classes,
            **result,
        )

    def anytime(
        self,
        slide_path: str | Path,
        *,
        margin: float | None = None,
        max_tiles: int | None = None,
        max_seconds: float | None = None,
        mpp: float | tuple[float, float] | None = None,
        block: int = BLOCK,
        n_readers: int = 1,
    ) -> Iterator[AnytimeStep]:
        """Classify a slide tile by tile, in LIPN's order, with an answer after each block.

        It ends when the lead of the first class over the second, in log odds, reaches the margin times the
        share of tiles that is left, when a budget is spent, or with the last tile. Close the iterator, or
        leave its loop, to stop at any time. A damaged tile is left out.

        Args:
            slide_path: The slide.
            margin: More than 0; infinite to read everything. By default the model's, which
                `rules.learn_margin` finds; where there is none, everything is read.
            max_tiles: Tiles to read at most.
            max_seconds: Seconds after which no further block is taken.
            mpp: Micrometres per level-0 pixel, where the file does not say or is wrong.
            block: Tiles between two answers; a margin was learned for one block size.
            n_readers: Threads that read ahead while the encoder runs, a block each and one more: what they
                have read when the answer is final is lost.

        Raises:
            ValueError: A budget is not positive, or the margin is out of range.
            SlideError: The slide cannot be read, has no scale, is smaller than a tile or has no tissue.
            CheckpointError: The model has no LIPN, or the encoder has changed.
        """
        self._need_lipn()
        margin = self.config.margin if margin is None else margin
        margin = math.inf if margin is None else margin
        budgets = {"margin": margin, "max_tiles": max_tiles, "max_seconds": max_seconds}
        networks = (self.encoder, self.lipn, self.dmin)
        return read_until(slide_path, *networks, mpp=mpp, block=block, n_readers=n_readers, **budgets)

    def predict_bag(self, bag: Bag, *, prescreen: bool = True) -> Prediction:
        """Classify a slide from its stored bag, as `predict` does from the file.

        Raises:
            BagError: The bag is of another encoder.
            CheckpointError: Pre-screening is asked of a model without LIPN.
        """
        self._check_bag(bag)
        seconds: dict[str, float] = {}
        with stage(seconds, "total"):
            mask = self._screen(bag.patches, seconds) if prescreen else None
            rows = _rows_to_read(mask, len(bag.coords))
            features = np.asarray(bag.features[rows], dtype=np.float32)
            result = self._classify(features, rows, mask, len(bag.coords), seconds)
        rowcol, thumbnail = _mosaic(bag)
        return Prediction(
            slide_id=bag.slide_id,
            coords=bag.coords,
            shape=(len(thumbnail) // PATCH_SIZE, thumbnail.shape[1] // PATCH_SIZE),
            rowcol=rowcol,
            thumbnail=thumbnail,
            seconds=seconds,
            classes=self.config.classes,
            **result,
        )

    def trajectory(self, bag: Bag, block: int = BLOCK) -> Trajectory:
        """How `anytime` would go on a slide whose bag is stored: what `rules.learn_margin` learns from.

        Args:
            bag: The slide's.
            block: Tiles between two answers.

        Raises:
            BagError: The bag is of another encoder.
            CheckpointError: The model has no LIPN.
        """
        self._check_bag(bag)
        self._need_lipn()
        scores = select_tiles(self.lipn, bag.patches)[1].max(axis=1)
        features = torch.from_numpy(np.asarray(bag.features, np.float32))
        return trajectory(self.dmin, features, scores, block)

    def _screen(self, patches: np.ndarray, seconds: dict[str, float]) -> np.ndarray:
        """LIPN's mask (N, C)."""
        self._need_lipn()
        with stage(seconds, "lipn"):
            return select_tiles(self.lipn, patches, self.config.thresholds)[0]

    def _need_lipn(self) -> None:
        if self.lipn is None:
            raise CheckpointError(
                "the model has no lipn.safetensors to choose tiles with; predict with all tiles "
                "(prescreen=False, --all-tiles), or train LIPN"
            )

    @torch.inference_mode()
    def _classify(
        self,
        features: np.ndarray,
        rows: np.ndarray,
        mask: np.ndarray | None,
        n_tiles: int,
        seconds: dict[str, float],
    ) -> dict[str, np.ndarray]:
        """DMIN on the features (n, D) of the tiles `rows`, as the fields of a prediction over all tiles."""
        with stage(seconds, "dmin"):
            output = self.dmin(torch.from_numpy(features))
            probabilities = output.logits.softmax(0).numpy()
        attention = np.full((n_tiles, len(self.config.classes)), np.nan, dtype=np.float32)
        attention[rows] = output.attention.numpy()
        if mask is None:
            pooled = np.ones_like(attention) if output.mask is None else output.mask.numpy()
            mask = pooled.astype(bool)
        return {
            "probabilities": probabilities,
            "attention": attention,
            "mask": mask,
            "kept": mask.any(axis=1),
        }

    def _checked(self, encoder: Encoder) -> Encoder:
        config = self.config
        if (encoder.name, encoder.weights_hash) != (config.encoder, config.weights_hash):
            raise CheckpointError(
                f"the model was trained on features of {config.encoder} (weights {config.weights_hash}), "
                f"not of {encoder.name} (weights {encoder.weights_hash}); use that encoder, or train a model "
                "on bags of this one"
            )
        return encoder

    def _check_bag(self, bag: Bag) -> None:
        config = self.config
        name, weights = bag.attrs.get("encoder"), bag.attrs.get("weights_hash")
        if (name, weights) != (config.encoder, config.weights_hash):
            raise BagError(
                f"bag {bag.slide_id} holds features of {name} (weights {weights}), the model was trained on "
                f"{config.encoder} (weights {config.weights_hash}); extract the slide with that encoder"
            )


def _mosaic(bag: Bag) -> tuple[np.ndarray, np.ndarray]:
    """Grid positions of a bag's tiles, from the first tissue on, and its patches put together."""
    scale = np.array([bag.attrs["mpp_x"], bag.attrs["mpp_y"]])
    pitch = bag.attrs["patch_size"] * bag.attrs["tile_mpp"] / scale
    colrow = np.rint((bag.coords - bag.coords.min(axis=0)) / pitch).astype(np.int64)
    rowcol = colrow[:, ::-1]
    rows, cols = rowcol.max(axis=0) + 1
    blocks = np.full((rows, cols, PATCH_SIZE, PATCH_SIZE, 3), 255, np.uint8)
    blocks[rowcol[:, 0], rowcol[:, 1]] = bag.patches
    return rowcol, blocks.swapaxes(1, 2).reshape(rows * PATCH_SIZE, cols * PATCH_SIZE, 3)


def _rows_to_read(mask: np.ndarray | None, n_tiles: int) -> np.ndarray:
    """Tiles that at least one branch keeps; all where there is no mask."""
    return np.arange(n_tiles) if mask is None else np.flatnonzero(mask.any(axis=1))
