"""Plain data with something else in one place: what files of users may hold."""


def paths_of(value, prefix=()):
    """Every path into nested dicts and lists, the root left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*prefix, key)
        yield from paths_of(child, (*prefix, key))


def changed(value, path, new):
    """A copy of `value` with `new` at `path`."""
    if not path:
        return new
    if isinstance(value, list):
        return [changed(child, path[1:], new) if index == path[0] else child for index, child in enumerate(value)]
    return {key: changed(child, path[1:], new) if key == path[0] else child for key, child in value.items()}


def at(value, path):
    for key in path:
        value = value[key]
    return value


def without(value, path):
    parent = at(value, path[:-1])
    if isinstance(parent, list):
        return changed(value, path[:-1], [child for index, child in enumerate(parent) if index != path[-1]])
    return changed(value, path[:-1], {key: child for key, child in parent.items() if key != path[-1]})
