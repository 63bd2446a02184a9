"""Routing that others recorded: readers of their files, and the trace made of what they say."""

from moesim.routing.importing.build import Asked, Words, import_routing
from moesim.routing.importing.forms import AUTO, FORMS, form_of

__all__ = ["AUTO", "FORMS", "Asked", "Words", "form_of", "import_routing"]
