"""Routing that others recorded: readers of their files, and the trace made of what they say."""

from moesim.routing.importing.build import READERS, Asked, import_routing

__all__ = ["READERS", "Asked", "import_routing"]
