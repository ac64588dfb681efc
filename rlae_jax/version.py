"""The version, known to the package and to what records the environment of a run."""

__version__ = "0.1.0"
