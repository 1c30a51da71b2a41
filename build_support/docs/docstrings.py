"""The docstrings of the package as mkdocstrings is to read them, an extension of griffe."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import griffe

from build_support.docs.markdown import from_docstring

FIELD = "ccu_fast.check.field"


class Docstrings(griffe.Extension):
    """Rewrites every docstring once all are loaded, when names can be resolved."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by griffe for a package that it has read."""
        _rewrite(pkg)


def _rewrite(thing: Any) -> None:
    if thing.docstring is not None:
        returns = str(thing.returns or "") if thing.is_function else ""
        thing.docstring.value = from_docstring(thing.docstring.value, partial(_link, thing), returns)
    if thing.is_attribute and getattr(thing.value, "canonical_path", "") == FIELD:
        thing.value = thing.value.arguments[0]  # the default; what else the field has is for the command line
    for member in thing.members.values():
        if not member.is_alias:
            _rewrite(member)


def _link(thing: Any, name: str) -> str:
    """The name as code, and a link where the site has it: an optional one without a target is no error."""
    target = name
    if name in thing.members:
        target = f"{thing.path}.{name}"
    else:
        with contextlib.suppress(griffe.NameResolutionError):  # a full name
            target = thing.resolve(name)
    return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'
