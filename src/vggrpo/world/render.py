"""A vectorised ray caster in torch: all clips, frames and pixels at once, on CPU or GPU.

Surfaces are analytic (room box, ball, box, cylinder), so depth, correspondence and flow are exact up to float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vggrpo.world.scene import Scene

FAR = 1e6
# The atlas is 3 x 3 tiles: six room faces and three objects.
_ATLAS_SIDE = 3
_AXES = [0, 0, 1, 1, 2, 2]  # of the room's faces
# Corners are darker, as in any room: without it a textured wall and its neighbour look like one surface at 64 pixels.
CORNER_SHADOW, CORNER_REACH = 0.5, 0.5


@dataclass
class SceneTensors:
    """A batch of scenes as tensors. B clips, T frames, N object slots."""

    room: Tensor  # (B, 2, 3)
    cam2room: Tensor  # (B, T, 4, 4)
    focal: Tensor  # (B,)
    shape: Tensor  # (B, N)
    half_size: Tensor  # (B, N, 3)
    pose: Tensor  # (B, N, T, 4, 4)
    moves: Tensor  # (B, N)
    atlas: Tensor  # (B, 3, 3A, 3A)
    light: Tensor  # (B, 3)

    @classmethod
    def stack(cls, scenes: list[Scene], device: torch.device | str = "cpu") -> SceneTensors:
        def cat(name: str) -> Tensor:
            return torch.from_numpy(np.stack([np.asarray(getattr(s, name)) for s in scenes])).to(device)

        tiles = cat("atlas")
        b, _, c, a, _ = tiles.shape
        atlas = tiles.view(b, _ATLAS_SIDE, _ATLAS_SIDE, c, a, a).permute(0, 3, 1, 4, 2, 5)
        atlas = atlas.reshape(b, c, _ATLAS_SIDE * a, _ATLAS_SIDE * a)
        return cls(
            cat("room").float(),
            cat("cam2room").float(),
            cat("focal").float(),
            cat("shape"),
            cat("half_size").float(),
            cat("pose").float(),
            cat("moves"),
            atlas.float(),
            cat("light").float(),
        )


@dataclass
class Hit:
    """First surface along each ray. Rays are laid out (B, T, P)."""

    depth: Tensor  # (B, T, P) z-depth, metres
    object_id: Tensor  # (B, T, P) 0 = room, k = object slot k - 1
    point: Tensor  # (B, T, P, 3) in the room
    direction: Tensor  # (B, T, P, 3) with unit z in the camera


def camera_rays(
    scene: SceneTensors, size: tuple[int, int], offset: tuple[float, float] = (0.5, 0.5)
) -> tuple[Tensor, Tensor]:
    """Origins (B, T, 1, 3) and directions (B, T, P, 3) in the room; unit z in the camera, so that t is z-depth."""
    height, width = size
    device = scene.room.device
    v, u = torch.meshgrid(
        torch.arange(height, device=device) + offset[1], torch.arange(width, device=device) + offset[0], indexing="ij"
    )
    focal = scene.focal[:, None] * width  # pixels
    x = (u.reshape(-1) - width / 2) / focal
    y = (v.reshape(-1) - height / 2) / focal
    local = torch.stack([x, y, torch.ones_like(x)], -1)  # (B, P, 3)
    rotation = scene.cam2room[..., :3, :3]
    direction = torch.einsum("btij,bpj->btpi", rotation, local)
    return scene.cam2room[:, :, None, :3, 3], direction


def cast(scene: SceneTensors, origin: Tensor, direction: Tensor) -> Hit:
    """Nearest hit of each ray with room and objects."""
    safe = torch.where(direction.abs() < 1e-9, torch.full_like(direction, 1e-9), direction)
    lower, upper = scene.room[:, 0, None, None], scene.room[:, 1, None, None]
    depth = (torch.where(safe > 0, upper, lower) - origin).div_(safe).amin(-1)  # inside a box: the nearest exit
    object_id = torch.zeros_like(depth, dtype=torch.uint8)
    for k in range(scene.shape.shape[1]):
        distance = _object_distance(scene, k, origin, direction)
        nearer = distance < depth
        depth = torch.where(nearer, distance, depth)
        object_id.masked_fill_(nearer, k + 1)
    return Hit(depth, object_id, origin + depth[..., None] * direction, direction)


def _object_distance(scene: SceneTensors, k: int, origin: Tensor, direction: Tensor) -> Tensor:
    """Distance to object slot k, FAR where missed; only the shapes that occur in the batch are computed."""
    rotation, centre = scene.pose[:, k, :, :3, :3], scene.pose[:, k, :, :3, 3]
    half = scene.half_size[:, k]
    out = torch.full(direction.shape[:-1], FAR, device=direction.device)
    for code, intersect in enumerate((_ball, _box, _cylinder)):
        rows = (scene.shape[:, k] == code).nonzero().flatten()
        if len(rows):
            local_o = torch.einsum("btji,btpj->btpi", rotation[rows], origin[rows] - centre[rows, :, None])
            local_d = torch.einsum("btji,btpj->btpi", rotation[rows], direction[rows])
            size = half[rows, None, None]
            out[rows] = intersect(local_o / size, local_d / size)
    return out


def _ball(o: Tensor, d: Tensor) -> Tensor:
    """Unit ball; o and d in units of the radius."""
    a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
    disc = b * b - a * c
    t = (-b - disc.clamp_min(0).sqrt()) / a
    return torch.where((disc > 0) & (t > 1e-4), t, torch.full_like(t, FAR))


def _box(o: Tensor, d: Tensor) -> Tensor:
    """The cube [-1, 1]^3 by slabs."""
    d = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    one, two = (-1 - o) / d, (1 - o) / d
    near, far = torch.minimum(one, two).amax(-1), torch.maximum(one, two).amin(-1)
    return torch.where((near < far) & (near > 1e-4), near, torch.full_like(near, FAR))


def _cylinder(o: Tensor, d: Tensor) -> Tensor:
    """Unit cylinder about y, |y| <= 1: the later of entering the tube and entering the slab, before the first exit."""
    flat_o, flat_d = o[..., [0, 2]], d[..., [0, 2]]
    a = (flat_d * flat_d).sum(-1).clamp_min(1e-12)
    b, c = (flat_o * flat_d).sum(-1), (flat_o * flat_o).sum(-1) - 1
    disc = b * b - a * c
    root = disc.clamp_min(0).sqrt()
    dy = torch.where(d[..., 1].abs() < 1e-9, torch.full_like(a, 1e-9), d[..., 1])
    one, two = (-1 - o[..., 1]) / dy, (1 - o[..., 1]) / dy
    near = torch.maximum((-b - root) / a, torch.minimum(one, two))
    far = torch.minimum((-b + root) / a, torch.maximum(one, two))
    return torch.where((disc > 0) & (near < far) & (near > 1e-4), near, torch.full_like(near, FAR))


def shade(scene: SceneTensors, hit: Hit) -> Tensor:
    """Colours (B, T, P, 3) in [0, 1]: Lambert light, soft shadows in corners and under objects, textures fixed to their
    surfaces."""
    lower, upper = scene.room[:, 0, None, None], scene.room[:, 1, None, None]
    unit = (hit.point - lower) / (upper - lower)  # (B, T, P, 3) in [0, 1]
    to_face = torch.cat([unit, 1 - unit], -1)[..., [0, 3, 1, 4, 2, 5]]  # of _AXES: x-, x+, ceiling, floor, z-, z+
    tile = to_face.argmin(-1)
    axis = torch.div(tile, 2, rounding_mode="floor")
    # Texture coordinates of a wall are its two other axes.
    u = torch.where(axis == 0, unit[..., 2], unit[..., 0])
    v = torch.where(axis == 1, unit[..., 2], unit[..., 1])
    lambert = 0.78 + 0.22 * _face_light(scene.light, tile)
    lambert = lambert * _contact_shadow(scene, hit, tile) * _corner_shadow(to_face * (upper - lower)[..., _AXES])
    for k in range(scene.shape.shape[1]):
        mine = hit.object_id == k + 1
        if not mine.any():
            continue
        bi, ti, pi = mine.nonzero(as_tuple=True)
        rotation, centre = scene.pose[bi, k, ti, :3, :3], scene.pose[bi, k, ti, :3, 3]
        local = torch.einsum("nji,nj->ni", rotation, hit.point[bi, ti, pi] - centre) / scene.half_size[bi, k]
        normal = torch.einsum("nij,nj->ni", rotation, _normal(local, scene.shape[bi, k]))
        # An oblique projection has no face on which the texture degenerates.
        u = u.index_put((bi, ti, pi), 0.5 + 0.33 * (local[:, 0] + 0.45 * local[:, 2]))
        v = v.index_put((bi, ti, pi), 0.5 + 0.33 * (local[:, 1] + 0.35 * local[:, 2]))
        tile = tile.index_put((bi, ti, pi), torch.full_like(bi, 6 + k))
        lambert = lambert.index_put((bi, ti, pi), 0.62 + 0.38 * (normal * scene.light[bi]).sum(-1).clamp_min(0))
    return (_sample_atlas(scene.atlas, tile, u, v) * lambert[..., None]).clamp(0, 1)


def _corner_shadow(distance: Tensor) -> Tensor:
    """How much light reaches a point of the room, given its distance (B, T, P, 6) to each face in metres: less near the
    other faces. The face it lies on, at distance 0, is divided out."""
    return (1 - CORNER_SHADOW * torch.exp(-distance / CORNER_REACH)).prod(-1) / (1 - CORNER_SHADOW)


def _face_light(light: Tensor, tile: Tensor) -> Tensor:
    """Cosine between light and the inward normal of each room face, (B, T, P)."""
    normals = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], device=light.device)
    cosine = light @ normals.T  # (B, 6)
    return torch.gather(cosine, 1, tile.reshape(len(light), -1)).view(tile.shape)


def _contact_shadow(scene: SceneTensors, hit: Hit, tile: Tensor) -> Tensor:
    """Darken the floor beneath objects; a cue for where things stand."""
    floor = ((tile == 3) & (hit.object_id == 0)).float()
    shadow = torch.ones_like(hit.depth)
    for k in range(scene.shape.shape[1]):
        offset = (hit.point - scene.pose[:, k, :, None, :3, 3])[..., [0, 2]]
        spread = scene.half_size[:, k, 0, None, None] ** 2 * 1.4
        strength = 0.45 * (scene.shape[:, k] >= 0).float()[:, None, None]
        shadow = shadow * (1 - floor * strength * torch.exp(-(offset * offset).sum(-1) / spread))
    return shadow


def _normal(local: Tensor, shape: Tensor) -> Tensor:
    """Unit normals of points on unit shapes, (N, 3); half extents are near enough to equal for shading."""
    box = F.one_hot(local.abs().argmax(-1), 3) * local.sign()
    side = local * torch.tensor([1.0, 0.0, 1.0], device=local.device)
    cap = local * torch.tensor([0.0, 1.0, 0.0], device=local.device)
    cylinder = torch.where(local[:, 1:2].abs() > 0.999, cap, side)
    out = torch.where((shape == 0)[:, None], local, torch.where((shape == 1)[:, None], box, cylinder))
    return F.normalize(out, dim=-1)


def _sample_atlas(atlas: Tensor, tile: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear look-up (B, T, P, 3); coordinates stay half a texel inside their tile."""
    texels = atlas.shape[-1] // _ATLAS_SIDE
    margin = 0.75 / texels
    u = u.clamp(margin, 1 - margin) + tile % _ATLAS_SIDE
    v = v.clamp(margin, 1 - margin) + torch.div(tile, _ATLAS_SIDE, rounding_mode="floor")
    grid = torch.stack([u, v], -1) * (2 / _ATLAS_SIDE) - 1
    return F.grid_sample(atlas, grid, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
