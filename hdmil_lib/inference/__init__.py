"""From a slide file to a prediction: pre-screening, then the classifier on the tiles that were kept."""

from hdmil_lib.inference.checkpoint import ModelConfig, best_fold
from hdmil_lib.inference.predictor import Prediction, Predictor
from hdmil_lib.inference.prescreen import prescreen

__all__ = ["ModelConfig", "Prediction", "Predictor", "best_fold", "prescreen"]
