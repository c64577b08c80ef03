"""Scores of predictions and of masks, stage timings, and the paper's tables."""
