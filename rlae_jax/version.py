"""The version: also of the distribution, which is built from this file."""

__version__ = "0.1.0"
