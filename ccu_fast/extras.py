"""Optional packages: which extra brings them, and what is said where one is missing.

To ask pip for an extra of ``ccu-fast`` by name would need a release on an index, which there is none of, and
``'.[apps]'`` works in the folder of a checkout alone. Messages therefore name the packages, which works anywhere.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

# Import name → what ``pip`` is asked for: a name, with its version where only one will do.
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
    "speech": {"espeakng_loader": "espeakng-loader==0.2.4"},
}


def extra_of(module: str) -> str | None:
    """The extra that brings an importable module; None when none does."""
    top = module.split(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if top in modules), None)


def distribution(requirement: str) -> str:
    """The name in what pip is asked for."""
    return requirement.partition("==")[0]


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def command(extra: str, *wanted: str) -> str:
    """The command that brings the packages of an extra that are not installed, and those that are wanted anyhow.

    >>> command("denoise", "opencv-python-headless")
    'pip install opencv-python-headless'
    """
    asked = EXTRAS[extra].values()
    names = [name for name in asked if name in wanted or installed(distribution(name)) is None]
    return f"pip install {' '.join(names or asked)}"


def missing(module: str, why: ImportError) -> str:
    """The message for a module of an extra that cannot be imported."""
    top, extra = module.split(".")[0], extra_of(module) or "apps"
    package = EXTRAS[extra].get(top, top)
    return f"{distribution(package)} is needed and cannot be imported ({why}): {command(extra, package)}"


def require(*modules: str) -> None:
    """Import what will be needed before the work begins.

    Raises:
        ImportError: one is missing or broken; says what to install.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            # Of two packages of ours, the one that the other needs is the one to install.
            absent = error.name if error.name and extra_of(error.name) else module
            raise ImportError(missing(absent, error), name=absent) from error
