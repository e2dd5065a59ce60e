"""Error types of a user's mistakes, told apart from bugs.

They live in the lowest layer so that every folder can raise them; commands turn each into one
line and exit code 2 (`launch/cli.py`).
"""

__all__ = ["CheckpointError", "ConfigError", "DataError"]


class ConfigError(ValueError):
    """A setting that cannot work; the message names field, value, allowed range and remedy."""


class DataError(ConfigError):
    """Training text or token files that cannot be used; the message names the file."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message names the folder and what differs."""
