"""HDMIL: fast and accurate classification of gigapixel pathology slides, as a course and a library."""

from hdmil_lib.config import Config, setup

__version__ = "0.1.0"
__all__ = ["Config", "setup", "__version__"]
