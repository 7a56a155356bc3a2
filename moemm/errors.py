"""One exception root, so that a caller can catch everything that moemm says on purpose.

Each message answers four questions: what was given, what is allowed, where it came from, what to do next.
"""


class MoemmError(Exception):
    """Base of every error that moemm raises for its users. `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(MoemmError):
    """A configuration that cannot be run: unknown key, wrong type, value out of range, contradiction."""

    exit_code = 2


class DataError(MoemmError):
    """A data file or a sample that is broken, hostile, or not what the run needs."""

    exit_code = 3


class CheckpointError(MoemmError):
    """A checkpoint that is incomplete, altered, or made by a different model."""

    exit_code = 4


class KernelError(MoemmError):
    """An op called with arguments that it cannot take, or a missing or stale compiled extension."""

    exit_code = 5


class LaunchError(MoemmError):
    """A launch that cannot start: port in use, ranks that disagree, an environment that contradicts itself."""

    exit_code = 6


class HealthError(MoemmError):
    """Training stopped on purpose: non-finite loss, gradients that differ between ranks."""

    exit_code = 7
