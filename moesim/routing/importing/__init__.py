"""Routing that others recorded: readers of their files, and the trace made of what they say."""

from moesim.routing.importing.build import ImportRequest, MessageWords, import_routing
from moesim.routing.importing.forms import AUTO, FORMS, form_of

__all__ = ["AUTO", "FORMS", "ImportRequest", "MessageWords", "form_of", "import_routing"]
