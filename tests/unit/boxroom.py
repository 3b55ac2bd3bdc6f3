"""A room with a block in it, ray cast in a few lines: exact depth that shares no code with the embedded world."""

from __future__ import annotations

import torch
from torch import Tensor

from vggrpo.geometry import GeometryPrediction, pixel_rays, so3_exp

SIZE = (64, 64)
ROOM = torch.tensor([[-2.0, -1.2, -1.0], [2.0, 1.2, 5.0]])
BLOCK = torch.tensor([[-0.5, 0.2, 2.0], [0.3, 1.2, 2.6]])
# Total translation (metres) and rotation (radians) of each move.
MOVES = {
    "still": ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    "truck": ((0.8, 0.0, 0.0), (0.0, 0.0, 0.0)),
    "dolly": ((0.0, 0.0, 0.9), (0.0, 0.0, 0.0)),
    "pedestal": ((0.0, -0.6, 0.0), (0.0, 0.0, 0.0)),
    "pan": ((0.0, 0.0, 0.0), (0.0, 0.5, 0.0)),
    "tilt": ((0.0, 0.0, 0.0), (0.3, 0.0, 0.0)),
    "orbit": ((1.0, 0.0, 0.2), (0.0, -0.4, 0.0)),
}


def camera_path(move: str, views: int = 5, start: float = 0.0) -> Tensor:
    """cam2world (S, 4, 4) of one move through the room at constant speed."""
    translation, rotation = (torch.tensor(v, dtype=torch.float64) for v in MOVES[move])
    time = torch.linspace(0, 1, views, dtype=torch.float64)[:, None]
    pose = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    pose[:, :3, :3] = so3_exp(time * rotation)
    pose[:, :3, 3] = time * translation + torch.tensor([start, 0.1 * start, 0.0], dtype=torch.float64)
    return pose


def cast_depth(cam2world: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """z-depth (..., H, W): rays have z = 1 in the camera, so the ray parameter is the depth."""
    rays = torch.einsum("...ij,...hwj->...hwi", cam2world[..., :3, :3], pixel_rays(intrinsics, size))
    rays = torch.where(rays.abs() < 1e-12, 1e-12, rays)
    centre = cam2world[..., None, None, :3, 3]
    room = ((ROOM.to(rays)[:, None, None] - centre[..., None, :, :, :]) / rays[..., None, :, :, :]).amax(-4)
    block = (BLOCK.to(rays)[:, None, None] - centre[..., None, :, :, :]) / rays[..., None, :, :, :]
    near, far = block.amin(-4).amax(-1), block.amax(-4).amin(-1)
    walls = room.amin(-1)
    return torch.where((near > 0) & (near < far), near, walls)


def clips(moves: list[str], *, views: int = 5, size: tuple[int, int] = SIZE, start: float = 0.0) -> GeometryPrediction:
    """Exact geometry (float64) of one clip a move; anchored cameras."""
    room_pose = torch.stack([camera_path(move, views, start) for move in moves])
    focal = 0.9 * size[1]
    intrinsics = torch.tensor(
        [[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1]], dtype=torch.float64
    ).expand(len(moves), views, 3, 3)
    depth = cast_depth(room_pose, intrinsics, size)
    return GeometryPrediction.from_depth(torch.linalg.inv(room_pose[:, :1]) @ room_pose, intrinsics, depth)


def smooth_noise(generator: torch.Generator, *shape: int, cells: int = 4, size: tuple[int, int] = SIZE) -> Tensor:
    """Band-limited noise of unit scale, (*shape, H, W)."""
    coarse = torch.randn(1, int(torch.tensor(shape).prod()), cells, cells, generator=generator, dtype=torch.float64)
    fine = torch.nn.functional.interpolate(coarse, size, mode="bicubic", align_corners=True)
    return fine.reshape(*shape, *size)


def wobble(prediction: GeometryPrediction, pixels: float, kind: str, seed: int = 0) -> GeometryPrediction:
    """The prediction, disturbed independently in each view by about so many pixels.

    "depth": the depth map is warped sideways, as a wobbling picture would warp it. "points": points slide parallel to
    the image. "cameras": each camera turns by the angle of that many pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, views, height, width = prediction.depth.shape
    size, focal = (height, width), prediction.intrinsics[0, 0, 0, 0]
    if kind == "cameras":
        turn = so3_exp(torch.randn(batch, views, 3, generator=generator, dtype=torch.float64) * pixels / focal)
        poses = prediction.cam2world.clone()
        poses[..., :3, :3] = poses[..., :3, :3] @ turn
        return GeometryPrediction.from_depth(poses, prediction.intrinsics, prediction.depth)
    shift = smooth_noise(generator, batch, views, 2, size=size) * pixels  # (B, S, 2, H, W)
    if kind == "points":
        sideways = torch.cat([shift, torch.zeros_like(shift[:, :, :1])], 2).movedim(2, -1)
        moved = sideways * (prediction.depth / focal)[..., None]
        moved = torch.einsum("bsij,bshwj->bshwi", prediction.cam2world[..., :3, :3], moved)
        return GeometryPrediction(
            prediction.cam2world, prediction.intrinsics, prediction.depth, prediction.points + moved, prediction.conf
        )
    grid = torch.nn.functional.affine_grid(
        torch.eye(2, 3, dtype=torch.float64)[None], [1, 1, height, width], align_corners=False
    )
    scale = torch.tensor([2 / width, 2 / height], dtype=torch.float64)
    warped = torch.nn.functional.grid_sample(
        1 / prediction.depth.flatten(0, 1)[:, None],
        grid + shift.movedim(2, -1).flatten(0, 1) * scale,
        padding_mode="border",
        align_corners=False,
    )
    return GeometryPrediction.from_depth(
        prediction.cam2world, prediction.intrinsics, 1 / warped[:, 0].unflatten(0, (batch, views))
    )
