"""Reproduction of the paper: its settings, its tables beside our results, and tests of its claims."""
