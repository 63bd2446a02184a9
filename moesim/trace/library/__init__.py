"""Trained routing that ships with the package: `library:NAME` wherever a scenario names a trace file."""

from moesim.trace.library.catalogue import (
    LibraryEntry,
    find_entry,
    is_library_name,
    library_entries,
    load_library,
)

__all__ = ["LibraryEntry", "find_entry", "is_library_name", "library_entries", "load_library"]
