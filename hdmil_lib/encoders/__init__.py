"""Tiles to bags: frozen encoders, their fast execution, and one HDF5 file a slide."""
