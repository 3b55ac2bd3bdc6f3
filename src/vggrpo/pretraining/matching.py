"""Dense matching as a teacher of pose: while a geometry network learns, a linear map on its tokens also says where each
patch went.

Pose alone gives a network two numbers a view to discover matching by, and it sits on a plateau for a thousand steps;
thousands of displacements a view end that plateau after 150. The map is thrown away afterwards.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vggrpo.geometry.se3 import invert_se3
from vggrpo.models.vggt import VGGT
from vggrpo.world import WorldBatch

CELL = 2  # pixels a side over which a displacement is averaged
FAR = 24.0  # pixels; longer displacements leave a 64-pixel picture anyway
SCALE = 4.0  # pixels; brings the linear map's outputs near one


def image_motion(world: WorldBatch, step: int) -> tuple[Float[Tensor, "B S H W 2"], Bool[Tensor, "B S H W"]]:
    """Displacement (x, y) in pixels of what each pixel of view i shows, to view i + step (1 or -1), and where it holds.

    It does not hold in the view without a neighbour, behind the camera and beyond `FAR`.
    """
    b, s, h, w = world.object_id.shape
    pose = torch.cat(
        [torch.eye(4).to(world.object_pose).expand_as(world.object_pose[:, :1]), world.object_pose], 1
    )  # (B, N + 1, S, 4, 4)
    moved = (torch.roll(pose, -step, 2) @ torch.linalg.inv(pose)).transpose(1, 2)
    to_camera = torch.roll(invert_se3(world.cam2world), -step, 1)
    transform = to_camera[:, :, None] @ moved  # (B, S, N + 1, 4, 4)
    index = world.object_id.view(b, s, h * w, 1).long().expand(-1, -1, -1, 16)
    transform = torch.gather(transform.flatten(3), 2, index).view(b, s, h, w, 4, 4)
    seen = torch.einsum("bshwij,bshwj->bshwi", transform[..., :3, :3], world.points) + transform[..., :3, 3]
    depth = seen[..., 2].clamp_min(0.1)
    focal, centre = world.intrinsics[..., 0, 0], world.intrinsics[..., :2, 2]
    there = seen[..., :2] / depth[..., None] * focal[..., None, None, None] + centre[:, :, None, None]
    rows, columns = (torch.arange(n, device=there.device) + 0.5 for n in (h, w))
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    motion = there - torch.stack([u, v], -1)
    valid = (seen[..., 2] > 0.1) & (motion.abs().amax(-1) < FAR)
    valid[:, -1 if step == 1 else 0] = False
    return motion, valid


class Matched(nn.Module):
    """A geometry network with the linear map; `predict` as the network's, and the loss of its last displacements."""

    def __init__(self, network: VGGT) -> None:
        super().__init__()
        self.network = network
        self.cells = network.config.patch // CELL
        self.match = nn.Linear(network.config.dim, 2 * self.cells**2 * 2)
        self._tokens: Tensor | None = None
        network.convs[-1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._tokens = output

    def loss(self, world: WorldBatch) -> Tensor:
        """Mean end-point error in pixels, of the batch that `network.predict` has just seen."""
        assert self._tokens is not None
        out = SCALE * self.match(self._tokens.permute(0, 2, 3, 4, 1)).float()  # (B, S, h, w, 2 c c 2)
        b, s, h, w, _ = out.shape
        c = self.cells
        out = out.view(b, s, h, w, 2, c, c, 2).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, s, 2, h * c, w * c, 2)
        self._tokens = None
        total = out.new_zeros(())
        for k, step in enumerate((1, -1)):
            with torch.autocast(out.device.type, enabled=False):  # bfloat16 would be off by a quarter of a pixel
                motion, valid = image_motion(world, step)
            motion = motion.view(b, s, h * c, CELL, w * c, CELL, 2).mean((3, 5))
            valid = valid.view(b, s, h * c, CELL, w * c, CELL).all(5).all(3)
            total = total + ((out[:, :, k] - motion).norm(dim=-1) * valid).sum() / valid.sum().clamp_min(1) / 2
        return total
