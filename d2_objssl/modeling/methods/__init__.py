"""One file per paper; each registers one builder in SSL_METHOD_REGISTRY."""

from . import cyborgs, detcon, semcl, slotcon  # noqa: F401
from .registry import SSL_METHOD_REGISTRY, SSLMethod

__all__ = ["SSL_METHOD_REGISTRY", "SSLMethod"]
