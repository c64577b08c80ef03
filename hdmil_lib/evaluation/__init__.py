"""Scores of predictions and of tile masks, with confidence intervals and tests."""
