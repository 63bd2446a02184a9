"""`moesim plot`: sweeps, plans and runs as one page each: cost against performance, curves, heat maps, comparisons."""

from moesim.report.plots.drawing import KINDS, PlotRequest
from moesim.report.plots.plot_page import plot_page

__all__ = ["KINDS", "PlotRequest", "plot_page"]
