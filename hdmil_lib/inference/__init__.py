"""Prediction of slides, early stopping, and fast rules with a guarantee."""
