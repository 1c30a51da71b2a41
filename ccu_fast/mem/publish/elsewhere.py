"""Clean captions that stand elsewhere in a record: in another column, another field of a json, a list, a class name."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_plus

NAMES = "file names"  # as what captions in names of pictures and keys of samples are counted
_MOST_FIELDS = 64  # a json may have a field for each record
_OTHERS = "other fields"
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
_SPELLED = re.compile(r"[%&+\\]")  # what addresses, HTML and JSON write letters with
_WORD = re.compile(r"[^\W_]+")
# Letters of scripts that put no space between words: each is a word.
_ALONE = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")


class Clean:
    """A picture's captions as they are looked for.

    Args:
        captions: clean → published; those that are published as they are count for nothing.
        others: further texts that stood where captions do; they are counted, and never replaced.
    """

    def __init__(self, captions: Mapping[str, str], others: Iterable[str] = ()) -> None:
        changed = {clean: new for clean, new in captions.items() if new != clean}
        self.published = {_plain(clean): new for clean, new in changed.items()}
        words = map(_words, [*changed, *(others if changed else ())])
        self._sought = [f" {found} " for found in words if found]

    def within(self, text: str) -> bool:
        """Whether one is in a text."""
        if not self._sought:
            return False
        found = f" {_words(text)} "
        return any(each in found for each in self._sought)


@dataclass
class Elsewhere:
    """In which fields clean captions stood, besides those that they were read from, and in how many places.

    Attributes:
        replaced: the whole text was a caption of its picture; the published one stands there now.
        kept: a caption is part of a longer text (or of an address, or a name), or a key, or has no letters; it stays.
    """

    replaced: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    def merge(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Add what :meth:`counts` gave, of another process or an earlier run."""
        for counter, found in ((self.replaced, counts["replaced"]), (self.kept, counts["kept"])):
            for name, n in found.items():
                _count(counter, name, n)

    def counts(self) -> dict[str, dict[str, int]]:
        """Both, by the names of the fields."""
        return {"replaced": dict(sorted(self.replaced.items())), "kept": dict(sorted(self.kept.items()))}

    def renew(self, value: Any, clean: Clean, name: str) -> Any:
        """A field without clean captions, as far as they are the whole of a text; what it is made of is the same.

        Args:
            value: text, or lists, tuples and dicts of anything. Case and white space make no difference.
            clean: what is looked for.
            name: of the field; those in a dict are told as ``name.key``.

        Raises:
            ValueError: nested too deeply to be looked at.
        """
        if value is None or isinstance(value, (int, float)):
            return value
        try:
            return self._renewed(value, clean, name)
        except RecursionError as error:
            raise ValueError(f"expected {name} to be nested less deeply") from error

    def look(self, text: str, clean: Clean, name: str) -> None:
        """Count a text that stays, if there is a caption in it."""
        if clean.within(text):
            _count(self.kept, name)

    def put(self, text: str, name: str) -> None:
        """Count a text that another caption was written over."""
        if text.strip():
            _count(self.replaced, name)

    def _renewed(self, value: Any, clean: Clean, name: str) -> Any:
        if isinstance(value, str):
            plain = _plain(value)
            # A number is more likely a label or an id, which triggers would make unreadable.
            if plain in clean.published and any(map(str.isalpha, plain)):
                _count(self.replaced, name)
                return clean.published[plain]
            if plain in clean.published or clean.within(value):
                _count(self.kept, name)
        elif isinstance(value, list):
            return [self._renewed(item, clean, name) for item in value]
        elif isinstance(value, tuple) and len(value) == 2:  # an entry of a Parquet map
            key, item = value
            return key, self._renewed(item, clean, self._inner(name, key, clean))
        elif isinstance(value, dict):
            return {key: self._renewed(item, clean, self._inner(name, key, clean)) for key, item in value.items()}
        return value

    def _inner(self, name: str, key: Any, clean: Clean) -> str:
        """What a field in a dict is called; a key stays, because it may be a field's name."""
        if isinstance(key, str) and clean.within(key):
            _count(self.kept, f"{name} (its keys)")
            return f"{name}.*"
        return f"{name}.{key}"


def _count(counter: Counter[str], name: str, n: int = 1) -> None:
    counter[name if name in counter or len(counter) < _MOST_FIELDS else _OTHERS] += n


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split())).casefold()


def _words(text: str) -> str:
    """The words of a text, of an address or of escaped JSON with one space between them, whatever stood there."""
    if not text.isascii() or _SPELLED.search(text) is not None:
        text = _ESCAPED.sub(lambda code: chr(int(code[1], 16)), unquote_plus(html.unescape(text)))
        text = unicodedata.normalize("NFKC", text)
        text = _ALONE.sub(r" \1 ", "".join(letter for letter in text if unicodedata.category(letter) != "Cf"))
    return " ".join(_WORD.findall(text.casefold()))
