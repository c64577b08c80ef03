"""Laboratories: controls over figures of the course, and games in which the reader does the work."""

from hdmil_lib.viz.laboratories.base import Laboratory
from hdmil_lib.viz.laboratories.curves import CurveFit, GumbelSigmoid
from hdmil_lib.viz.laboratories.lipn_games import BeatLIPN, found_share
from hdmil_lib.viz.laboratories.reading import AttentionMaps, LIPNThreshold, TeacherStudent
from hdmil_lib.viz.laboratories.stopping import StoppingGame, hindsight, stopping_points

__all__ = [
    "AttentionMaps",
    "BeatLIPN",
    "CurveFit",
    "GumbelSigmoid",
    "LIPNThreshold",
    "Laboratory",
    "StoppingGame",
    "TeacherStudent",
    "found_share",
    "hindsight",
    "stopping_points",
]
