"""The ways in which a user's request can fail; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Bad input: one line that says what, where and the remedy. Exit code 1."""

    exit_code = 1


class ConflictError(UserError):
    """A scenario whose every key is well-formed, but whose parts do not fit each other. Exit code 1."""


class InfeasibleError(UserError):
    """A well-formed scenario that cannot be laid out on its cluster. Exit code 2."""

    exit_code = 2


class MachineError(UserError):
    """What this machine refuses, not the input: a full disk, a process that cannot start. Exit code 1.

    It ends the call and is no verdict on a scenario: nothing is recorded, and the same call goes on from what is kept.
    """
