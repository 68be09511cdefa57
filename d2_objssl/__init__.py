"""d2_objssl: object-level self-supervised pretraining of detection backbones inside Detectron2."""

__version__ = "0.1.0"

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "d2_objssl needs Detectron2, which is not on PyPI under its own name. In a checkout of d2_objssl, `make env` "
        "installs a verified build; otherwise follow https://detectron2.readthedocs.io/tutorials/install.html."
    ) from error

from . import data, modeling  # noqa: F401  (they fill the catalogs and registries)
from .config import add_objssl_config

__all__ = ["__version__", "add_objssl_config"]
