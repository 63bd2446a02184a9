"""What a person sees of a run: the facts on the terminal and one self-contained HTML file."""

from moesim.report.report import write_report
from moesim.report.terminal import print_facts

__all__ = ["print_facts", "write_report"]
