"""Where a model out of a Python package lies once it has been converted; all that a plan needs to know of it."""

from __future__ import annotations

from pathlib import Path

from posttrain.models.config import Dtype, PackageFile
from posttrain.paths import user_cache

CONVERSION = "1"
"""Changed when the same GGUF file would be converted into other bytes; part of the key."""

SOURCE = "source.json"
"""Record of a cached folder; not part of the model."""


def cache_folder(package: PackageFile, dtype: Dtype) -> Path:
    """The folder of the converted model, whether it is there or not."""
    return user_cache() / "models" / f"{package.distribution}-{package.sha256[:16]}-{dtype}-v{CONVERSION}"


def is_converted(package: PackageFile, dtype: Dtype) -> bool:
    """True when the converted model is in the user's cache."""
    return (cache_folder(package, dtype) / SOURCE).is_file()
