"""Errors a user can cause. Each carries one message that says what was set, the rule, and what to type.

The command line prints these without a traceback and returns exit code 2; anything else is a defect of ours (exit 1).
"""


class UserError(Exception):
    """Base of everything the command line reports without a traceback."""


class ConfigError(UserError):
    """A setting is wrong, or two settings contradict each other."""


class DataError(UserError):
    """A data file is missing, damaged, or not what the stage needs."""


class CheckpointError(UserError):
    """A checkpoint or model directory is missing, damaged, or belongs to another run."""


class EngineError(UserError):
    """The machine cannot run what was asked, or training met a state it must not continue from."""


class OtherRankError(Exception):
    """Another rank failed, and this one stops with it. That rank's own message is the one to read."""

    def __init__(self, rank: int, kind: str, message: str, is_users: bool) -> None:
        super().__init__(f"rank {rank} failed with {kind}: {message}")
        self.rank, self.is_users = rank, is_users


class LostRankError(Exception):
    """Another rank died or did not answer in time."""
