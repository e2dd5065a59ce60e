"""Error types of a user's mistakes, told apart from bugs.

They live in the lowest layer so that every folder can raise them; commands turn each into one
line and exit code 2 (`launch/cli.py`).
"""

__all__ = ["CheckpointError", "ConfigError", "DataError", "RankError", "is_lost_peer"]

# what gloo, its sockets and NCCL say when another rank is gone or does not answer
_LOST_PEER = (
    "connection closed",
    "connection reset",
    "broken pipe",
    "timed out",
    "connectfull",
    "another rank ended or did not answer",
    "remote process exited",
)


class ConfigError(ValueError):
    """A setting that cannot work; the message names field, value, allowed range and remedy."""


class DataError(ConfigError):
    """Training text or token files that cannot be used; the message names the file."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message names the folder and what differs."""


class RankError(RuntimeError):
    """What ended a run, in a message that names rank, step and cause by itself."""


def is_lost_peer(message: str) -> bool:
    """Tell whether an error only says that another rank is gone or does not answer."""
    return any(words in message.lower() for words in _LOST_PEER)
