"""Routing that others recorded: readers of their files, and the trace made of what they say."""

from moesim.routing.importing.build import AUTO, FORMS, ImportRequest, MessageWords, form_of, import_routing

__all__ = ["AUTO", "FORMS", "ImportRequest", "MessageWords", "form_of", "import_routing"]
