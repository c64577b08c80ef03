"""Answers to the exercises, of which `check` says what is wrong, and the guesses that `quiz` asks for."""

from hdmil_lib.course import basics, puzzles, systems
from hdmil_lib.course.quizzes import quiz
from hdmil_lib.course.verdicts import Verdict, check, exercises

__all__ = ["Verdict", "basics", "check", "exercises", "puzzles", "quiz", "systems"]
