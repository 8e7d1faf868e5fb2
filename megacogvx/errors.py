"""The typed errors that a user's mistake raises.

Every message names the values, the rule that they break and a way out. A broken promise of our own code is an
`assert` with shapes, never one of these.
"""


class MegacogvxError(Exception):
    """Base of every error below; `megacogvx` prints its text without a traceback and ends with `exit_status`."""

    exit_status = 2


class ConfigError(MegacogvxError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(MegacogvxError):
    """A video, caption file, dataset or record can't be read, or doesn't hold what its index says."""


class AgreedError(DataError):
    """A `DataError` that every rank raises at the same place, so that what they have begun together can be finished.

    Args:
        message: the text.
        unforeseen: no rank met a user's error, but a fault, of a file system say, that starting again may pass.
    """

    def __init__(self, message: str, *, unforeseen: bool = False) -> None:
        super().__init__(message)
        self.exit_status = 1 if unforeseen else 2


class CheckpointError(MegacogvxError):
    """A checkpoint is missing, half written, damaged or of another model."""


class LaunchError(MegacogvxError):
    """The program was started with too few processes, or without what its layout needs."""


class EndpointError(MegacogvxError):
    """A service that was named, such as the language model that writes prompts out, doesn't answer as it should."""
