"""Guesses before an experiment: choices to click, and what the notebook finds."""

from dataclasses import dataclass

import ipywidgets as w

from hdmil_lib.errors import HDMILError, nearest


@dataclass(frozen=True)
class Question:
    """A question of "Predict first"; its wording stands in the notebook.

    Attributes:
        number: Its number in the notebook's list.
        choices: Answers to choose from.
        found: The one that the notebook finds.
        reason: One sentence that says why, or where to look.
    """

    number: int
    choices: tuple[str, ...]
    found: str
    reason: str

    def reply(self, guess: str) -> str:
        """What is said to a guess."""
        verdict = "As we will find." if guess == self.found else f"We will find: {self.found}."
        return f"{verdict} {self.reason}"


QUIZZES: dict[str, tuple[Question, ...]] = {
    "00": (
        Question(
            1,
            ("10 %", "40 %", "80 %"),
            "40 %",
            "On Camelyon16; on the other two data sets the paper drops about 30 %.",
        ),
        Question(
            2,
            ("10 %", "29 %", "40 %"),
            "29 %",
            "It would be 40 % if every part of the work shrank with the tiles.",
        ),
    ),
    "01": (
        Question(
            1,
            ("256 and 512", "256.5 and 512", "512 and 1,024"),
            "256.5 and 512",
            "128 µm / 0.499 µm is no whole number, and rounding errs by half a pixel per tile.",
        ),
        Question(2, ("20", "39", "70"), "39", "More than half of this slide is glass."),
    ),
    "02": (
        Question(
            1,
            ("turned by 90°", "a paler stain", "twice the scale"),
            "twice the scale",
            'See "Where it fails": a paler stain hardly moves a vector, and turning a tile moves it too.',
        ),
    ),
    "03": (
        Question(
            1,
            ("max, attention, mean", "attention, max, mean", "attention, mean, max"),
            "attention, max, mean",
            "A few percent of tumor drown in an average.",
        ),
        Question(
            2,
            ("max", "mean", "attention"),
            "mean",
            'The worst classifier of the three finds the tiles best: see "A puzzle".',
        ),
        Question(
            3,
            ("about 0.5", "about 0.7", "about 0.9"),
            "about 0.5",
            "Far above, the stain alone would give the label away.",
        ),
    ),
    "04": (
        Question(
            1,
            ("about 60 %", "more", "fewer"),
            "fewer",
            'The rate holds with noise; see "Where it fails".',
        ),
        Question(
            2,
            ("not at all", "by about 10 points", "by about 30 points"),
            "not at all",
            'See "The answer": tiles of high attention carry it. Random ones would not.',
        ),
        Question(
            3,
            ("yes", "no"),
            "no",
            "Attention that was trained without distillation finds these tiles as well.",
        ),
    ),
    "05": (
        Question(1, ("|e₁| + |e₂|", "sin(3 e₁)", "e₁ e₂"), "e₁ e₂", "A sum of curves has no interaction."),
        Question(
            2, ("linear", "K = 3", "K = 12"), "linear", "On average; K = 3 is too near to tell them apart."
        ),
        Question(
            3,
            ("0 points", "3 points", "7 points"),
            "7 points",
            "At K = 12, mostly from two failed trainings. At K = 3 we see none.",
        ),
    ),
    "06": (
        Question(1, ("50 %", "70 %", "90 %"), "70 %", "On the fold that we look at, 69 %."),
        Question(
            2,
            ("0 %", "10 %", "30 %", "60 %"),
            "0 %",
            "LIPN ranks worse than chance there, and the notebook finds out why.",
        ),
        Question(3, ("40", "400", "4,000"), "4,000", "3,938, for the small encoder of this course."),
    ),
    "07": (
        Question(1, ("30 %", "50 %", "80 %"), "50 %", "Nearly all of the time goes with the tiles."),
        Question(
            2,
            ("0 to 3", "8", "15"),
            "0 to 3",
            "One to three points.",
        ),
        Question(
            3,
            ("30 %", "60 %", "90 %"),
            "30 %",
            "With a learned margin on larger slides; on small ones with a margin of 8 about 73 %.",
        ),
    ),
    "08": (
        Question(1, ("63", "73", "81"), "81", "The pooled AUC also compares slides of different folds."),
        Question(2, ("1", "5", "15"), "15", "In about 16 of 100."),
        Question(3, ("3", "6", "10"), "6", "At a rate of 5 %, six errors or more occur once in 40 trials."),
    ),
    "09": (
        Question(1, ("0.5", "2", "8"), "8", "Two tensors have 13 numbers for each input."),
        Question(
            2,
            ("6 µs", "30 µs", "250 µs"),
            "250 µs",
            "About 270 µs, in 5 of which the GPU is busy.",
        ),
    ),
    "10": (
        Question(
            1,
            ("none, and part of one slide", "one, and one slide", "all of this worker's"),
            "none, and part of one slide",
            "A bag is whole before it gets its name.",
        ),
        Question(2, ("140", "500", "1,000"), "140", "Then the network is full."),
    ),
    "11": (
        Question(
            1,
            ("when its turn comes", "before the first slide"),
            "before the first slide",
            "`hdmil doctor` opens every header in seconds.",
        ),
        Question(
            2,
            ("a quarter", "as many", "four times as many"),
            "a quarter",
            "Each shows four times the tissue of a true tile, at half the size.",
        ),
        Question(3, ("takes it", "leaves it"), "takes it", "Unless a preset says otherwise."),
    ),
}
"""Questions by number of the notebook."""


class Quiz(w.VBox):
    """Questions with a row of buttons each; a click is a guess, which stays, and is answered beside it.

    Args:
        questions: The questions.
    """

    def __init__(self, questions: tuple[Question, ...]):
        self.guesses: dict[int, str] = {}
        super().__init__([self._row(question) for question in questions])

    def _row(self, question: Question) -> w.VBox:
        buttons = [w.Button(description=choice, layout=w.Layout(width="auto")) for choice in question.choices]
        reply = w.HTML()

        def guess(clicked: w.Button) -> None:
            self.guesses[question.number] = clicked.description
            for button in buttons:
                button.disabled = True
            clicked.button_style = "info"
            reply.value = question.reply(clicked.description)

        for button in buttons:
            button.on_click(guess)
        return w.VBox([w.HBox([w.Label(f"{question.number}."), *buttons]), reply])


def quiz(notebook: str) -> Quiz:
    """The guesses of a notebook's "Predict first".

    Args:
        notebook: Its number, such as "04".

    Raises:
        HDMILError: There is no such notebook.
    """
    if notebook not in QUIZZES:
        raise HDMILError(
            f"there is no quiz {notebook!r}{nearest(notebook, QUIZZES)}; choose from {', '.join(QUIZZES)}"
        )
    return Quiz(QUIZZES[notebook])
