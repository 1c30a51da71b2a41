"""Optional packages: which extra installs them, and the message where one is missing."""

from __future__ import annotations

import importlib
import sys

# Import name → what ``pip`` calls it.
EXTRAS = {
    "apps": {
        "typer": "typer",
        "rich": "rich",
        "PIL": "pillow",
        "matplotlib": "matplotlib",
        "jinja2": "jinja2",
        "sklearn": "scikit-learn",
        "safetensors": "safetensors",
        "webdataset": "webdataset",
        **({} if sys.version_info >= (3, 11) else {"tomli": "tomli"}),
    },
    "parquet": {"pyarrow": "pyarrow"},
    "denoise": {"cv2": "opencv-python-headless"},
    "speech": {"espeakng_loader": "espeakng-loader"},
}


def extra_of(module: str) -> str | None:
    """The extra that brings an importable module; None when none does."""
    top = module.split(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if top in modules), None)


def missing(module: str, why: ImportError) -> str:
    """The message for a module of an extra that cannot be imported."""
    top, extra = module.split(".")[0], extra_of(module) or "apps"
    return f"{EXTRAS[extra].get(top, top)} is needed and cannot be imported ({why}): pip install 'ccu-fast[{extra}]'"


def require(*modules: str) -> None:
    """Import what will be needed before the work begins.

    Raises:
        ImportError: one is missing or broken; says what to install.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(missing(module, error), name=module) from error
