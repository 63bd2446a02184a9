"""The ways in which a user's request can fail; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Bad input: one line that says what, where and the remedy. Exit code 1."""

    exit_code = 1


class ConflictError(UserError):
    """A scenario whose every key is well-formed, but whose parts do not fit each other. Exit code 1."""


class InfeasibleError(UserError):
    """A well-formed scenario that cannot be laid out on its cluster. Exit code 2."""

    exit_code = 2
