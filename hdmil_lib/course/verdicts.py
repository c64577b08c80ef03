"""How an answer to an exercise is judged: the registry of checks, verdicts, and what many checks share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hdmil_lib.errors import HDMILError, nearest

State = Literal["open", "wrong", "right"]


@dataclass(frozen=True)
class Verdict:
    """What `check` found; a notebook shows its text.

    Attributes:
        exercise: Number of notebook and exercise, such as "04.3".
        state: "open" without an answer, otherwise "wrong" or "right".
        text: One or two sentences for the reader.
    """

    exercise: str
    state: State
    text: str

    def __repr__(self) -> str:
        head = {"open": "not answered yet", "wrong": "not yet", "right": "right"}[self.state]
        return f"Exercise {self.exercise}, {head}. {self.text}"


class Wrong(Exception):
    """Raised inside a check: an answer is wrong, and this is the hint."""


Check = Callable[..., str]
_CHECKS: dict[str, Check] = {}


def check(exercise: str, answer: object, **given: object) -> Verdict:
    """Compare an answer with what the exercise asks for.

    Args:
        exercise: Number of notebook and exercise, such as "04.3".
        answer: What the exercise asks for: a word, a number, a function. `None`, a sequence of
            nothing else, and a mapping that holds `None` count as not answered.
        given: Measurements of the notebook that the answer is compared with, where the exercise needs some.

    Returns:
        The verdict. Its text leads on from a wrong answer and adds an explanation to a right one.

    Raises:
        HDMILError: There is no exercise of that number.
    """
    if exercise not in _CHECKS:
        raise HDMILError(
            f"there is no exercise {exercise!r}{nearest(exercise, _CHECKS)}; choose from {', '.join(_CHECKS)}"
        )
    if _unanswered(answer):
        return Verdict(
            exercise, "open", "Write your answer in place of the placeholder and run the cell again."
        )
    try:
        return Verdict(exercise, "right", _CHECKS[exercise](answer, **given))
    except Wrong as hint:
        return Verdict(exercise, "wrong", str(hint))


def exercises() -> list[str]:
    """Numbers of all exercises that `check` knows, in order."""
    return sorted(_CHECKS)


def _unanswered(answer: object) -> bool:
    if isinstance(answer, Mapping):
        return not answer or any(value is None for value in answer.values())
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        return all(value is None for value in answer)
    return answer is None or (isinstance(answer, str) and not answer)


def exercise(number: str) -> Callable[[Check], Check]:
    """Register the decorated function as the check of the exercise with this number."""

    def register(function: Check) -> Check:
        _CHECKS[number] = function
        return function

    return register


def choose(answer: object, right: str, options: Iterable[str], hint: str) -> None:
    """Hold an answer to one of the options."""
    options = list(options)
    if answer not in options:
        raise Wrong(f"{answer!r} is none of the options: {', '.join(options)}.")
    if answer != right:
        raise Wrong(hint)


def number(answer: object) -> float:
    """The answer as a finite number."""
    try:
        value = float(answer)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise Wrong(f"The answer is to be a number, and {answer!r} is none.") from None
    if not np.isfinite(value):
        raise Wrong(f"The answer is {value}, which is not a finite number.")
    return value


def call(function: object, *arguments: object) -> Any:
    """What the reader's function returns; its own error becomes the hint."""
    if not callable(function):
        raise Wrong(f"Pass the function itself, not {type(function).__name__}.")
    try:
        result = function(*arguments)
    except Exception as error:
        raise Wrong(f"Your function raised {type(error).__name__}: {error}") from error
    if result is None:
        raise Wrong("Your function returns None. Replace its placeholder, and return the result.")
    return result
