"""Reproducing the paper: its settings and figures, its tables, and its claims held against ours."""
