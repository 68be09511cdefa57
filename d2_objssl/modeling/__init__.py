"""Meta-architecture, heads and methods."""

from . import methods  # noqa: F401  (fills SSL_METHOD_REGISTRY)
from .meta_arch import ObjectSSL

__all__ = ["ObjectSSL"]
