"""Answers to the exercises: `check` says what is wrong with one, and does not tell the answer."""

from hdmil_lib.course import basics, puzzles, systems
from hdmil_lib.course.verdicts import Verdict, check, exercises

__all__ = ["Verdict", "basics", "check", "exercises", "puzzles", "systems"]
