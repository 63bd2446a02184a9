"""Routing of a transformers model on a disk: its routers are watched while it reads a text."""

from moesim.routing.hf.loading import FAMILIES, Family
from moesim.routing.hf.recording import ReadingOptions, record_model

__all__ = ["FAMILIES", "Family", "ReadingOptions", "record_model"]
