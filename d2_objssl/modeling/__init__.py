"""Meta-architecture, heads and methods."""

from . import backbone, methods, swin  # noqa: F401  (they fill BACKBONE_REGISTRY and SSL_METHOD_REGISTRY)
from .meta_arch import ObjectSSL

__all__ = ["ObjectSSL"]
