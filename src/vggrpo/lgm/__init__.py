"""The Latent Geometry Model: a geometry network that reads video latents instead of frames."""

from __future__ import annotations

from vggrpo.lgm.model import LatentGeometryModel, LGMConfig

__all__ = ["LGMConfig", "LatentGeometryModel"]
