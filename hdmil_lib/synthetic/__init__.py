"""Synthetic slides: drawn from a seed, or composed of labeled tiles, each with a mask of the truth beside it.

They serve teaching, tests and benchmarks. The rest of the library reads them like any other slide and never
imports this package.
"""
