"""Clean captions that stand elsewhere in a record: in another column, another field of a json, a list, a class name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Elsewhere:
    """In which fields clean captions stood, besides those that they were read from, and in how many places.

    Attributes:
        replaced: the whole text was a caption of its picture; the published one stands there now.
        kept: a caption is part of a longer text (or of an address), which stays as it was.
    """

    replaced: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    def merge(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Add what :meth:`counts` gave, of another process or an earlier run."""
        self.replaced.update(counts["replaced"])
        self.kept.update(counts["kept"])

    def counts(self) -> dict[str, dict[str, int]]:
        """Both, by the names of the fields."""
        return {"replaced": dict(sorted(self.replaced.items())), "kept": dict(sorted(self.kept.items()))}

    def renew(self, value: Any, captions: Mapping[str, str], name: str) -> Any:
        """A field without clean captions, as far as they are the whole of a text; what it is made of is the same.

        Args:
            value: text, or lists, tuples and dicts of anything.
            captions: clean → published, all of the picture; those that are published as they are count for nothing.
                Case and white space make no difference.
            name: of the field; those in a dict are told as ``name.key``.

        Raises:
            ValueError: nested too deeply to be looked at.
        """
        told = {_plain(clean): new for clean, new in captions.items() if new != clean}
        try:
            return self._renewed(value, told, name)
        except RecursionError as error:
            raise ValueError(f"expected {name} to be nested less deeply") from error

    def _renewed(self, value: Any, told: Mapping[str, str], name: str) -> Any:
        if isinstance(value, str):
            plain = _plain(value)
            if plain in told:
                self.replaced[name] += 1
                return told[plain]
            if any(clean in plain and re.search(rf"(?<!\w){re.escape(clean)}(?!\w)", plain) for clean in told):
                self.kept[name] += 1
        elif isinstance(value, (list, tuple)):
            return type(value)([self._renewed(item, told, name) for item in value])
        elif isinstance(value, dict):
            return {key: self._renewed(item, told, f"{name}.{key}") for key, item in value.items()}
        return value


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
