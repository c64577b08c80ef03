"""Errors that a user can act on: each message names the file, what is wrong and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class HDMILError(Exception):
    """Base of all errors that hdmil raises on purpose; the command line prints them in one line."""


class SlideError(HDMILError):
    """A slide cannot be opened, lacks its scale, or contains no tissue to tile."""


class BagError(HDMILError):
    """A bag file is damaged, or was made by another encoder or with another dimension."""


class CohortError(HDMILError):
    """A label table, a split or a cohort does not fit its slides."""


class CheckpointError(HDMILError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a message about an unknown name: " (did you mean 'abmil'?)", or nothing."""
    spelled = {other.lower(): other for other in known}
    close = get_close_matches(name.lower(), spelled, n=1)
    return f" (did you mean {spelled[close[0]]!r}?)" if close else ""
