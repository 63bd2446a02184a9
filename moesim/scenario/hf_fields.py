"""The fields of a `config.json`, each looked up by the kind of value that it must have."""

import math
from collections.abc import Mapping
from typing import Any

from moesim.errors import UserError
from moesim.scenario.hf_keys import shown


class Config:
    """The file's fields; a missing one is a user's mistake, not a KeyError. It knows which were looked at."""

    def __init__(self, fields: Mapping[str, Any], name: str) -> None:
        self._fields, self._name = dict(fields), name
        self.read: set[str] = set()
        self.left_out: list[str] = []

    def get(self, key: str) -> Any:
        """The value as it is in the file; None where there is none."""
        self.read.add(key)
        return self._fields.get(key)

    def refuse(self, key: str, what: str) -> UserError:
        """The error that names the key and its value."""
        return UserError(f"{self._name}: {shown(key, self._fields.get(key))} {what}")

    def count(self, *keys: str, default: int | None = None) -> int:
        """A whole number under any of the names `keys`; `default` (or an error without one) where all are null."""
        found = {key: self.get(key) for key in keys if self.get(key) is not None}
        for key, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self.refuse(key, "must be a whole number that is not negative")
            if value != next(iter(found.values())):
                raise self.refuse(key, f'contradicts "{next(iter(found))}", another name for the same')
        if not found and default is None:
            raise UserError(f'{self._name} has no "{keys[0]}"')
        return next(iter(found.values()), default or 0)

    def number(self, key: str, default: float) -> float:
        """A finite number; `default` where the file has none or null."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(key, "must be a finite number")
        return value

    def same(self, *keys: str, default: int | None = None) -> int:
        """As `count`, of keys that may also list a number for every layer; a list of several numbers is refused."""
        for key in keys:
            value = self.get(key)
            if isinstance(value, list) and value:
                if any(type(entry) is not int or entry < 0 or entry != value[0] for entry in value):
                    raise self.refuse(key, "is not supported, only one whole number for all layers")
                self._fields[key] = value[0]
        return self.count(*keys, default=default)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false; `default` where the file has none or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return default if value is None else value

    def items(self, key: str) -> list[Any]:
        """A list; empty where the file has none or null."""
        value = self.get(key)
        if not isinstance(value, list | None):
            raise self.refuse(key, "must be a list")
        return value or []

    def only(self, key: str, value: int) -> None:
        """Refuses a layout that a scenario cannot express."""
        if self.get(key) not in (None, value):
            raise self.refuse(key, f"is not supported, only {value}")

    def note(self, key: str, left_out: str) -> None:
        """Keeps what the model here does not have of the file's."""
        self.left_out.append(f"{self._name}: {shown(key, self._fields.get(key))}: {left_out}")
