"""Guesses can be made once, and their choices are those of the notebooks."""

import json

import pytest
from conftest import REPOSITORY

from hdmil_lib.course import quiz
from hdmil_lib.course.quizzes import QUIZZES
from hdmil_lib.errors import HDMILError

NOTEBOOKS = {path.name[:2]: path for path in (REPOSITORY / "notebooks").glob("[0-9]*.ipynb")}


def test_a_guess_is_answered_and_stays():
    shown = quiz("08")
    row, reply = shown.children[0].children
    low, middle, _ = row.children[1:]
    middle.click()
    assert reply.value.startswith("We will find: 81. ")
    assert shown.guesses == {1: "73"}
    assert low.disabled
    assert (low.button_style, middle.button_style) == ("", "info")
    row, reply = shown.children[1].children
    row.children[3].click()
    assert reply.value.startswith("As we will find. ")
    assert shown.guesses == {1: "73", 2: "15"}


def test_each_notebook_has_a_quiz_and_no_other():
    assert sorted(NOTEBOOKS) == sorted(QUIZZES)
    with pytest.raises(HDMILError, match="no quiz '12'"):
        quiz("12")


@pytest.mark.parametrize("number", sorted(QUIZZES))
def test_a_quiz_stands_below_its_questions(number):
    cells = json.loads(NOTEBOOKS[number].read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    asked = next(i for i, text in enumerate(texts) if text.startswith("## Predict first"))
    assert f'quiz("{number}")' in texts[asked + 1]
    for question in QUIZZES[number]:
        assert f"\n{question.number}. " in texts[asked]
        assert question.found in question.choices
        assert len(set(question.choices)) == len(question.choices) > 1
