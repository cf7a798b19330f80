"""Suasion: from people's votes to a model they prefer, with every step checked.

The package imports in a few milliseconds; torch and transformers load only when a stage needs them.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("suasion")
except PackageNotFoundError:  # a source tree on PYTHONPATH that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
