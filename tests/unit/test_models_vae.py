"""The image autoencoder: frames by themselves; damaged and foreign files are refused."""

from __future__ import annotations

import pytest
import torch

from vggrpo.errors import UserError
from vggrpo.models.vae import VAE, ImageVAE, weights_hash
from vggrpo.models.wan import WanVideoModel


def save(vae, folder):
    for part in ("encoder", "decoder"):
        torch.save(getattr(vae, part).state_dict(), folder / f"tiny_{part}.pth")


def test_frames_are_encoded_by_themselves(tmp_path):
    torch.manual_seed(0)
    save(ImageVAE(4), tmp_path)
    vae = ImageVAE.from_pretrained(tmp_path)
    assert isinstance(vae, VAE) and vae.latent_spec.channels == 4 and vae.latent_spec.temporal_stride == 1
    video = torch.rand(2, 3, 3, 16, 32)
    latents = vae.encode_video(video)
    assert latents.shape == (2, 4, 3, 2, 4) and vae.decode(latents).shape == video.shape
    torch.testing.assert_close(vae.encode_video(video[:, :, 1:2]), latents[:, :, 1:2])
    with pytest.raises(UserError, match="multiple of 16"):
        vae.encode_video(video[..., :12])


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"no \*_encoder\.pth"):
        ImageVAE.from_pretrained(tmp_path)
    save(ImageVAE(4), tmp_path)
    torch.save({"conv_in.weight": torch.zeros(3)}, tmp_path / "tiny_decoder.pth")
    with pytest.raises(UserError, match=r"decoder in .* is of another architecture") as error:
        ImageVAE.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    (tmp_path / "tiny_encoder.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        ImageVAE.from_pretrained(tmp_path)


def test_the_hash_knows_weights():
    torch.manual_seed(0)
    one, two = ImageVAE(4), ImageVAE(4)
    assert weights_hash(one) != weights_hash(two)
    two.load_state_dict(one.state_dict())
    assert weights_hash(one) == weights_hash(two)
    with torch.no_grad():
        two.encoder[0].bias[0] += 1e-3
    assert weights_hash(one) != weights_hash(two)


def test_a_wan_pipeline_is_a_vae_and_tells_its_normalisation(tiny_wan_dir):
    model = WanVideoModel.from_pretrained(tiny_wan_dir, load_vae=False, load_text=False)
    assert isinstance(model, VAE)
    assert model.latent_spec.mean == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert model.latent_spec.std == pytest.approx([1.0, 1.2, 1.4, 1.6])
