"""Stand-ins for torchvision, which open_clip imports for image files and which has no build for CPU torch.

Every name imported from it is an empty class: enough to import, but not to compute.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any, ClassVar

MODULES = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
)


class _Named(type):
    """Members of a stand-in, such as those of an enumeration, are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(ModuleType):
    __version__ = "0.0"
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Named(name, (), {})
        setattr(self, name, made)
        return made


def install() -> None:
    """Make ``import torchvision`` work where it is not installed; a real one is left alone.

    transformers looks for torchvision once and remembers: asked after this, it would load its image processors on the
    stand-ins, and whatever the same process imports from it later would fail.
    """
    try:
        from transformers.utils import is_torchvision_available, is_torchvision_v2_available
    except ImportError:
        pass
    else:
        is_torchvision_available()
        is_torchvision_v2_available()
    stand_in(*MODULES)


def stand_in(*names: str) -> None:
    """Empty modules of these names, parents before children, for what is not installed."""
    missing = {n for n in names if "." not in n and n not in sys.modules and importlib.util.find_spec(n) is None}
    for name in names:
        if name.split(".")[0] not in missing:
            continue
        module = _Stub(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
