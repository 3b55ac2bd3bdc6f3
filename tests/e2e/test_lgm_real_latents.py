"""Real frames through a published autoencoder; real latents, at full shape, through an LGM of random weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from test_lgm import tiny_lgm, tiny_vggt

from vggrpo.io.video import read_video
from vggrpo.lgm.clips import fit_frame
from vggrpo.models.vae import ImageVAE

pytestmark = pytest.mark.e2e


def test_pretrained_weights_reconstruct_real_frames(shared_dir):
    vae = ImageVAE.from_pretrained(shared_dir / "data" / "autoencoder")
    frames, _ = read_video(shared_dir / "data" / "videos" / "dog-example.mp4", 5)
    video = torch.stack([torch.from_numpy(fit_frame(frame, (176, 320))) for frame in frames[::4]])
    video = video.permute(3, 0, 1, 2)[None].float() / 255
    with torch.no_grad():
        latents = vae.encode_video(video)
        back = vae.decode(latents)
    assert latents.shape == (1, 32, 2, 22, 40) and 0.5 < latents.std() < 1.5
    assert -10 * torch.log10((back - video).square().mean()) > 24  # dB; an untrained one has about 5


def test_real_latents_give_finite_geometry(shared_dir: Path) -> None:
    path = shared_dir / "data/latents/wan21_latents.pth"
    if not path.is_file():
        pytest.skip("no latents beside the checkout")
    z = torch.load(path, map_location="cpu", weights_only=True)
    assert z.shape == (1, 16, 16, 40, 64)
    geometry = tiny_vggt(patch_embed="patch", patch=16, dim=16, pairs=1, hooks=(1,))
    model = tiny_lgm(geometry, latent_channels=16, stride=2)
    with torch.no_grad():
        out = model(z.float())
    assert out.depth.shape == (1, 16, 320, 512) and out.frame_index is not None and out.frame_index[-1] == 60
    assert all(x.isfinite().all() for x in (out.depth, out.cam2world, out.points)) and (out.depth > 0).all()


def test_real_wan_latents_at_full_shape(shared_dir: Path) -> None:
    """Wan2.1's latents (16 channels, /8) go through a stride-2 connector at every clip and picture size they come in.

    The network's weights are random: this shows shapes, anchoring and finite rewards, nothing about accuracy.
    """
    from vggrpo import LatentGeometryReward

    z = torch.load(shared_dir / "data" / "latents" / "wan21_latents.pth", map_location="cpu", weights_only=True).float()
    assert z.shape == (1, 16, 16, 40, 64)
    lgm = tiny_lgm(latent_channels=16, stride=2)
    with torch.inference_mode():
        prediction = lgm(z)
        scores = LatentGeometryReward(lgm)(z)
    assert prediction.depth.shape == (1, 16, 20 * 8, 32 * 8)  # a token of 16 pixels is a patch of 8 here
    assert prediction.frame_index.tolist() == list(range(0, 61, 4))
    torch.testing.assert_close(prediction.cam2world[:, 0], torch.eye(4)[None])
    assert all(torch.isfinite(v.float()).all() for v in scores.values())
