"""What a cross-validation left in its folder: test predictions, scores and trained models."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pandas as pd

from hdmil_lib.errors import CheckpointError
from hdmil_lib.evaluation.metrics import fold_scores, mean_sd
from hdmil_lib.evaluation.statistics import summary_table
from hdmil_lib.methods import METHODS, check_methods
from hdmil_lib.models import DMIN, HDMIL, LIPN, MILModel, ModelInfo, create_model
from hdmil_lib.models.info import name_digest
from hdmil_lib.splits import Split, read_splits
from hdmil_lib.storage import load_weights
from hdmil_lib.training.cascade import load_cascade
from hdmil_lib.training.fit import WEIGHTS
from hdmil_lib.training.joint import LIPN_WEIGHTS
from hdmil_lib.training.records import fitting, read_cross_validation, read_model, read_rows, read_run


class CrossValidation:
    """Test predictions, scores and models of a finished cross-validation.

    Attributes:
        folder: Folder with the splits, `config.json`, and one folder `<method>/fold<k>` per training.
        predictions: One row per method, fold and test slide: `method`, `fold`, `slide_id`, `label`,
            `p_<class index>` for each class, and `keep_ratio`, the share of tiles that are read.
    """

    def __init__(self, folder: str | Path, methods: Sequence[str] | None = None):
        """Open the folder that `cross_validate` wrote.

        Args:
            folder: The folder.
            methods: Methods whose predictions are read, in this order; by default all of the folder.

        Raises:
            HDMILError: A method is unknown.
            CheckpointError: The folder holds no cross-validation, or a method is not finished.
        """
        self.folder = Path(folder)
        self._config = read_cross_validation(self.folder)
        if methods is None:
            methods = [name for name in METHODS if (self.folder / name).is_dir()]
        check_methods(methods)
        paths = [
            self._fold(name, fold) / "predictions.csv" for name in methods for fold in range(self.n_folds)
        ]
        absent = [path for path in paths if not path.is_file()]
        if absent:
            raise CheckpointError(
                f"{absent[0].parent}: was not run to its end; run the cross-validation again"
            )
        columns = (
            "method",
            "fold",
            "slide_id",
            "label",
            "keep_ratio",
            *(f"p_{c}" for c in range(len(self.classes))),
        )
        tables = [read_rows(path, columns, dtype={"slide_id": str}) for path in paths]
        self.predictions = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"method": []})

    @property
    def n_folds(self) -> int:
        """Number of folds."""
        return self._config.n_folds

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the class indices."""
        return self._config.classes

    @property
    def splits(self) -> list[Split]:
        """Training, validation and test slides of each fold."""
        return read_splits(self.folder / "splits")

    @property
    def cases(self) -> dict[str, str]:
        """Case by slide_id."""
        table = read_rows(self.folder / "slides.csv", ("slide_id", "case_id"), dtype=str)
        return dict(zip(table["slide_id"], table["case_id"], strict=True))

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """Scores of every method in percent: AUC with its interval, accuracy, and share of tiles read.

        Args:
            level: Confidence level of the intervals.
        """
        return summary_table(self.predictions, self.cases, level=level)

    def model(self, method: str, fold: int) -> MILModel | HDMIL:
        """Model of a method on a fold, in evaluation mode: an `HDMIL` if the method screens tiles.

        Raises:
            HDMILError: The method is unknown.
            CheckpointError: The method was not run on that fold, or its files are damaged.
        """
        check_methods([method])
        return self.classifier(method, fold) if METHODS[method].screen is None else self.hdmil(fold, method)

    def best(self, method: str) -> MILModel | HDMIL:
        """Model of the fold with the lowest validation loss, in evaluation mode.

        Raises:
            HDMILError: The method is unknown.
            CheckpointError: The method was not run, or its files are damaged.
        """
        return self.model(method, self.best_fold(method))

    def best_fold(self, method: str = "hdmil") -> int:
        """Fold with the lowest validation loss of a method, or of the method whose networks it uses."""
        check_methods([method])
        entry = METHODS[method]
        trained = entry.base if entry.screen in ("random", "published", "cascade") else method
        losses = {}
        for fold in range(self.n_folds):
            path = self._fold(trained, fold) / "history.csv"
            if not path.is_file():
                raise CheckpointError(
                    f"{path.parent}: was not run to its end; run the cross-validation again"
                )
            losses[fold] = read_rows(path, ["val_loss"])["val_loss"].min()
        return min(losses, key=lambda fold: losses[fold])

    def classifier(self, method: str, fold: int) -> MILModel:
        """Bag classifier that a method trained on a fold, in evaluation mode."""
        folder = self._fold(method, fold)
        description = read_model(folder)
        with fitting(folder / "model.json"):
            model = create_model(**description)
        load_weights(model, folder / WEIGHTS)
        return model.eval()

    def hdmil(self, fold: int, method: str = "hdmil") -> HDMIL:
        """HDMIL of a method on a fold: its two networks with their thresholds."""
        entry = METHODS[method]
        joint = entry.screen == "joint"
        if entry.screen == "cascade":
            lipn = self.hdmil(fold, entry.base).lipn
            cascade = load_cascade(self._dmin(entry.dmin, fold), lipn, self._fold(method, fold))
            cascade.info = self._info(method, fold)
            return cascade
        trained = method if entry.screen in ("lipn", "joint") else entry.base
        folder = self._fold(trained, fold)
        thresholds = read_run(folder).thresholds
        if thresholds is None:
            raise CheckpointError(f"{folder}: LIPN is not trained to its end; run the cross-validation again")
        dmin = self._dmin(method if joint else entry.dmin, fold)
        lipn = LIPN(dmin.n_classes)
        load_weights(lipn, folder / (LIPN_WEIGHTS if joint else WEIGHTS))
        published = entry.screen == "published"
        with fitting(folder / "config.json"):
            return HDMIL(
                dmin,
                lipn,
                thresholds=None if published else thresholds,
                pooling="lipn" if published else "dmin",
                trained_thresholds=thresholds,
                info=self._info(trained, fold),
            )

    def _dmin(self, method: str, fold: int) -> DMIN:
        return cast(DMIN, self.classifier(method, fold))

    def _info(self, method: str, fold: int) -> ModelInfo:
        """What a method was trained for, with its mean test scores if its predictions are loaded."""
        metrics: dict[str, float | str] = {}
        rows = self.predictions[self.predictions["method"] == method]
        if len(rows):
            scores = fold_scores(rows)
            metrics = {
                "test AUC, mean (sd) over folds": mean_sd(scores["auc"]),
                "test accuracy, mean (sd) over folds": mean_sd(scores["accuracy"]),
                "share of tiles read": round(float(scores["keep_ratio"].mean()), 4),
            }
        tiles, split = self._config.tiles, self.splits[fold]
        return ModelInfo(
            classes=self.classes,
            encoder=self._config.encoder.name,
            encoder_weights=self._config.encoder.weights_hash,
            cohort=self._config.cohort,
            seen=tuple(map(name_digest, (*split.train, *split.val))),
            metrics=metrics,
            **({} if tiles is None else tiles.model_dump()),
        )

    def _fold(self, method: str, fold: int) -> Path:
        return self.folder / method / f"fold{fold}"
