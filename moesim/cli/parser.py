"""The parser of the command line: errors are one line with a suggestion, and never argparse's exit code 2."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from moesim import __version__
from moesim.cli import catalogue, layouts, measurements, simulations, studies, traces
from moesim.errors import UserError, closest

VERBS = {
    verb.name: verb
    for verb in (
        simulations.RUN,
        traces.TRACE,
        traces.TRACE_IMPORT,
        traces.TRACE_HF,
        traces.TRACE_EXPORT,
        studies.SWEEP,
        studies.PLAN,
        studies.PLOT,
        catalogue.SCENARIOS,
        catalogue.FROM_MEGATRON,
        catalogue.MODEL,
        catalogue.GPUS,
        measurements.IMPORT_STEP,
        layouts.TOPOLOGY,
        layouts.VOLUME,
        layouts.PLACEMENT,
        simulations.GOODPUT,
        simulations.SERVE,
        measurements.CALIBRATE,
        measurements.VALIDATE,
        catalogue.SCHEMA,
        catalogue.COMPLETION,
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


def build() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and those of the verbs by name."""
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
        verb.add_arguments(by_name[name])
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
