"""Routing of a transformers model on a disk: its routers are watched while it reads a text."""

from moesim.routing.hooks.loading import FAMILIES, Family
from moesim.routing.hooks.recording import Reading, record_model

__all__ = ["FAMILIES", "Family", "Reading", "record_model"]
