"""A stateful runtime extension of SGLang: a turn costs what is new."""

__version__ = "0.1.0"

SGLANG_VERSION = "0.5.23"
"""The one SGLang release this package is built on and fingerprinted against."""
