"""What a person sees of a run: the facts on the terminal, one self-contained HTML file, a timeline for trace tools."""

from moesim.report.report import write_report
from moesim.report.run_view import print_facts
from moesim.report.timeline import check_ranks, write_timeline

__all__ = ["check_ranks", "print_facts", "write_report", "write_timeline"]
