"""`moesim plot`: sweeps, plans and runs as one page each: cost against performance, curves, heat maps, comparisons."""

from moesim.report.plots.choice import KINDS, Asked
from moesim.report.plots.document import plot_page

__all__ = ["KINDS", "Asked", "plot_page"]
