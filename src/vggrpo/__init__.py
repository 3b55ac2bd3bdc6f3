"""vggrpo: post-train video diffusion models for world consistency with 4D rewards read from their latents.

The method is VGGRPO (arXiv 2603.26599).
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["LatentGeometryReward", "__version__"]


def __getattr__(name: str) -> object:
    # Lazy, so that `import vggrpo` and `vggrpo --help` never pay for torch.
    if name == "LatentGeometryReward":
        from vggrpo.rewards.latent import LatentGeometryReward

        return LatentGeometryReward
    raise AttributeError(f"module 'vggrpo' has no attribute {name!r}")
