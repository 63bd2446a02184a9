"""`moesim completion SHELL`: the line that teaches a shell to complete verbs, flags, names and files."""

import argparse

from moesim.errors import UserError

NAME = "completion"
SUMMARY = "Print what a shell needs to complete moesim's verbs, flags and names."
SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SHELL."""
    text = 'put eval "$(moesim completion bash)" into ~/.bashrc, the same with zsh into ~/.zshrc'
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}; {text}")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Print the shell code. Raises UserError when argcomplete is not installed."""
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError:
        raise UserError("completion needs argcomplete: install moesim[completion]") from None
    print(shellcode(["moesim"], shell=args.shell))
    return 0
