"""Figures and widgets: the same plot functions serve notebooks, widgets, the tutorial and the README."""
