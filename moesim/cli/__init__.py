# PYTHON_ARGCOMPLETE_OK
"""The command line: verbs that belong together share a module; nothing heavy is imported before a verb needs it.

Errors of the parser are one line with a suggestion, and never argparse's exit code 2.
"""

import argparse
import errno
import gc
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import NoReturn

from moesim import __version__
from moesim.cli import catalogue, launches, layouts, measurements, one_scenario, studies, traces
from moesim.cli.flags import INTERRUPTED_EXIT_CODE, Interrupted, discard_output, open_closed_streams, write_stderr
from moesim.errors import UserError, closest, one_line
from moesim.processes import signals_interrupt

MADE_PER_COLLECTION = 500_000  # Python's 700 objects take a twelfth of a large run, to find next to nothing
_BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE, as shells report it
# What the machine alone is the reason of, wherever it comes up: full disks, too few files or processes, no memory.
_SHORTAGES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 user error, 2 infeasible, 130 interrupted.

    Errors of a user are one line on stderr; anything else is a bug and keeps its traceback. SIGTERM and SIGHUP act like
    Ctrl-C.
    """
    open_closed_streams()
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    try:
        with signals_interrupt():
            return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except Interrupted as error:
        return _fail(str(error), INTERRUPTED_EXIT_CODE)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        return _without_reader()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich leaves so
            return _without_reader()
        raise
    except OSError as error:
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}; check the path, its permissions and the space left", 1)
        if error.errno not in _SHORTAGES:
            raise
        discard_output(sys.stdout)
        return _fail(f"{error.strerror}: make room on the disk (standard output included) or in memory, then again", 1)


def _run(argv: Sequence[str]) -> int:
    args = parse(argv)
    gc.set_threshold(MADE_PER_COLLECTION)
    code: int = args.execute(args) if args is not None else 0
    sys.stdout.flush()  # here, where a broken pipe is still caught
    return code


def _complete() -> None:
    """Answer the shell, which asks what may follow, and leave; see `moesim completion`."""
    import argcomplete

    argcomplete.autocomplete(build()[0], exclude=["-v", "-V"])


def _fail(message: str, code: int) -> int:
    write_stderr(f"moesim: {one_line(message)}")
    return code


def _without_reader() -> int:
    """The reader of standard output or error went away (`| head`)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard_output(stream)
    return _BROKEN_PIPE_EXIT_CODE


VERBS = {
    each.name: each
    for each in (
        one_scenario.run,
        traces.trace,
        traces.trace_import,
        traces.trace_hf,
        traces.trace_export,
        studies.sweep,
        studies.plan,
        studies.plot,
        catalogue.scenarios,
        launches.from_megatron,
        catalogue.model,
        catalogue.gpus,
        measurements.import_step,
        layouts.topology,
        layouts.volume,
        layouts.placement,
        one_scenario.goodput,
        one_scenario.serve,
        measurements.calibrate,
        measurements.validate,
        catalogue.schema,
        catalogue.completion,
    )
}
WORDS = {"help": "--help", "version": "--version"}  # words for flags: `moesim help`, `moesim help run`


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError; argparse would leave with 2, which means infeasible here."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the one line that argparse would print."""
        if message.endswith("expected one argument"):
            message += ", which is written FLAG=VALUE where it begins with a dash"
        raise UserError(f"{message}; see `{self.prog} --help`")


@cache
def build() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and those of the verbs by name; made once in a process."""
    parser = Parser(
        prog="moesim",
        description="What will this Mixture-of-Experts model cost on that cluster, given how its router really routes?",
        epilog="`moesim help VERB` explains one verb, `moesim version` tells which moesim this is. "
        "Exit codes: 0 done, 1 mistake in the input, 2 infeasible, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("-v", "-V", "--version", action="version", version=f"moesim {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb")
    by_name = {}
    for name, verb in VERBS.items():
        by_name[name] = verbs.add_parser(name, help=verb.summary, description=verb.summary, allow_abbrev=False)
        for flag in verb.flags:
            flag.add(by_name[name])
        by_name[name].set_defaults(execute=verb.execute)
    return parser, by_name


def parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """The arguments of one call, None when it only asked for help or the version.

    Raises UserError for an unknown verb or flag, with the nearest known one.
    """
    _refuse_empty(argv)
    parser, by_name = build()
    argv = _with_long_verbs(_without_words(argv))
    if not argv:
        parser.print_help()
        return None
    if not argv[0].startswith("-") and argv[0] not in VERBS:
        raise UserError(f"unknown verb {argv[0]!r}{closest(argv[0], [*VERBS, *WORDS])}; see `moesim --help`")
    try:
        args, unknown = parser.parse_known_args(argv)
    except SystemExit:  # --help and --version have printed their text
        return None
    return args if not unknown else _refuse(unknown, by_name.get(args.verb, parser))


def _refuse_empty(argv: Sequence[str]) -> None:
    """Raise UserError for an argument without content: no verb takes one, and a path would be the working folder."""
    for before, word in zip(("", *argv), argv, strict=False):
        flag, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
        if equals and not value.strip():
            what = flag if flag.startswith("--") else "an argument"
            raise UserError(f"{what} is empty; write what is meant, or leave it out (is a shell variable not set?)")


def _without_words(argv: Sequence[str]) -> list[str]:
    """`help` and `version` as the flags that they stand for, with the verb that is asked about in front."""
    if not argv or argv[0] not in WORDS:
        return list(argv)
    return [*(word for word in argv[1:] if word not in WORDS), WORDS[argv[0]]]


def _with_long_verbs(argv: Sequence[str]) -> list[str]:
    """Verbs of two words (`trace import`) as one."""
    pair = " ".join(argv[:2])
    return [pair, *argv[2:]] if pair in VERBS else list(argv)


def _refuse(unknown: Sequence[str], parser: Parser) -> NoReturn:
    flag = unknown[0].split("=")[0]
    if not flag.startswith("-"):
        raise UserError(f"unexpected argument {flag!r}; see `{parser.prog} --help`")
    known = [option for action in parser._actions for option in action.option_strings]
    raise UserError(f"unknown flag {flag!r}{closest(flag, known)}; see `{parser.prog} --help`")
