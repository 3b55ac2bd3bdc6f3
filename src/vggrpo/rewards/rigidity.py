"""Subject rigidity: does what moves keep its size and shape? (Ours; METHOD.md section 6b.)

The paper's rewards leave moving things out, so a ball that melts while it rolls costs nothing. Here every subject
(connected piece of the subject mask) is asked two questions from each view i to the next:

    e_rigid = sqrt( min_{R,t}  sum_p w_p |R X_p + t - (X_p + F_p)|^2 / sum_p w_p )  /  size
    e_shape = mean over visible p of |z(X_p + F_p) - D_{i+1}(u, v)|  /  size
    r       = 1/2 [ 1/(1 + e_rigid) + 1/(1 + e_shape) ]

F is the scene flow, w the confidence, size the subject's weighted RMS radius in view i. e_rigid: one rigid motion must
explain the flow (weighted Procrustes). e_shape: where the flow carries the surface, the next view's own depth must
lie, so that a flow that claims rigidity cannot hide a surface that shrinks, grows or vanishes. A point that comes to
lie behind what the next view sees by more than `hidden` sizes is occluded and does not count; one in front is charged
in full. Both errors are means over subjects and steps, weighted by pixels, and free of scale.

R and t carry no gradient: at the minimum the derivative through them vanishes, so the gradient is exact, and
nothing has to be differentiated through a singular value decomposition whose values coincide. Visibility and pieces
are fixed as well.

A clip in which no subject of `min_pixels` can be followed is invalid: a subject that vanished is not a rigid one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction, depth_edges, project
from vggrpo.rewards.base import Reward, RewardContext, finite_clips, full_precision, judged, usable_pixels
from vggrpo.rewards.reprojection import read_inverse_depth


def label_pieces(
    mask: Bool[Tensor, "N H W"], depth: Float[Tensor, "N H W"], jump: float = 0.1
) -> tuple[Int[Tensor, "N H W"], int]:
    """Number the connected pieces of each map: neighbours (up, down, left, right) in the mask whose depths differ by
    less than `jump`, relative.

    Returns:
        Labels 1, 2, ... over all maps together, 0 outside of the mask, and their count.
    """
    n, height, width = mask.shape
    count = n * height * width
    own = torch.arange(count, device=mask.device).view(n, height, width)
    label = own.clone()
    joins = []
    for axis in (1, 2):
        first, second = (own.narrow(axis, start, own.shape[axis] - 1) for start in (0, 1))
        near, far = (depth.narrow(axis, start, own.shape[axis] - 1) for start in (0, 1))
        both = mask.narrow(axis, 0, own.shape[axis] - 1) & mask.narrow(axis, 1, own.shape[axis] - 1)
        joined = both & ((near - far).abs() < jump * torch.minimum(near, far))
        joins.append(torch.stack([first[joined], second[joined]]))
    one, two = torch.cat(joins, 1)
    flat = label.flatten()
    while True:  # each round hands the smaller label over every joint and then follows it to its end
        low = torch.minimum(flat[one], flat[two])
        new = flat.scatter_reduce(0, one, low, "amin").scatter_reduce(0, two, low, "amin")
        new = torch.minimum(new, new[new])
        if torch.equal(new, flat):
            break
        flat = new
    roots = torch.unique(flat[mask.flatten()])
    numbered = torch.zeros(count, dtype=torch.long, device=mask.device)
    numbered[roots] = torch.arange(1, len(roots) + 1, device=mask.device)
    return torch.where(mask.flatten(), numbered[flat], 0).view(n, height, width), len(roots)


@dataclass(frozen=True)
class _Subjects:
    """The P judged pixels of all subjects of all clips and steps, and where the scene flow takes them.

    `source`, `moved`: (P, 3). `weight`: confidence. `piece`: 0 ... pieces - 1. `clip`: 0 ... B - 1. `place`: flat index
    into the (B, S - 1, H, W) maps. `size`: RMS radius of each piece, (pieces,).
    """

    source: Float[Tensor, "P 3"]
    moved: Float[Tensor, "P 3"]
    weight: Float[Tensor, " P"]
    piece: Int[Tensor, " P"]
    clip: Int[Tensor, " P"]
    place: Int[Tensor, " P"]
    size: Float[Tensor, " K"]

    @property
    def pieces(self) -> int:
        return len(self.size)


def _sum_by(values: Float[Tensor, "P ..."], index: Int[Tensor, " P"], count: int) -> Float[Tensor, "K ..."]:
    return values.new_zeros(count, *values.shape[1:]).index_add(0, index, values)


def procrustes(
    source: Float[Tensor, "P 3"],
    target: Float[Tensor, "P 3"],
    weight: Float[Tensor, " P"],
    piece: Int[Tensor, " P"],
    pieces: int,
) -> tuple[Float[Tensor, "K 3 3"], Float[Tensor, "K 3"]]:
    """Rigid motion of each piece that minimises ``sum w |R x + t - y|^2`` (Kabsch), without gradient.

    Args:
        source: points of all pieces together.
        target: where they go.
        weight: >= 0, some of it in every piece.
        piece: 0 ... K - 1, which piece a point belongs to.
        pieces: K.

    Returns:
        Rotations (determinant + 1, also where the points lie in a plane) and translations.
    """
    with torch.no_grad():
        mass = _sum_by(weight, piece, pieces)[:, None]
        mean_x, mean_y = (_sum_by(weight[:, None] * points, piece, pieces) / mass for points in (source, target))
        x, y = source - mean_x[piece], target - mean_y[piece]
        covariance = _sum_by(weight[:, None, None] * y[:, :, None] * x[:, None, :], piece, pieces)
        u, _, v = torch.linalg.svd(covariance.double())
        last = torch.ones_like(u[:, 0])
        last[:, 2] = torch.linalg.det(u @ v).sign()
        rotation = ((u * last[:, None]) @ v).to(source)
        return rotation, mean_y - torch.einsum("kij,kj->ki", rotation, mean_x)


def _find_subjects(
    prediction: GeometryPrediction,
    surface: Bool[Tensor, "B S H W"],
    depth: Float[Tensor, "B S H W"],
    min_pixels: int,
) -> _Subjects:
    """Pieces of at least `min_pixels` on the subjects' surfaces, in all views but the last."""
    assert prediction.scene_flow is not None and prediction.subject_mask is not None
    flow = prediction.scene_flow[:, :-1].flatten(0, 3)
    chosen = (surface & prediction.subject_mask)[:, :-1].flatten(0, 1)
    chosen = chosen & flow.isfinite().all(-1).view_as(chosen)
    label, count = label_pieces(chosen, depth[:, :-1].detach().flatten(0, 1))
    large = torch.bincount(label.flatten(), minlength=count + 1) >= min_pixels
    large[0] = False
    renumbered = large.long().cumsum(0) - 1
    place = large[label].flatten().nonzero()[:, 0]
    piece, pieces = renumbered[label.flatten()[place]], int(large.sum())
    source = prediction.points[:, :-1].flatten(0, 3)[place]
    weight = prediction.conf[:, :-1].flatten()[place].detach()
    mass = _sum_by(weight, piece, pieces)
    centre = _sum_by(weight[:, None] * source, piece, pieces) / mass[:, None]
    spread = _sum_by(weight * (source - centre[piece]).square().sum(-1), piece, pieces) / mass
    clip = place // chosen[0].numel() // (depth.shape[1] - 1)
    return _Subjects(source, source + flow[place], weight, piece, clip, place, (spread + 1e-12).sqrt())


def _rigid_error(subjects: _Subjects, clips: int) -> Float[Tensor, " B"]:
    """``e_rigid`` of each clip: mean over its pieces, weighted by their pixels; 0 for a clip without any."""
    piece, pieces = subjects.piece, subjects.pieces
    rotation, translation = procrustes(subjects.source, subjects.moved, subjects.weight, piece, pieces)
    rigid = torch.einsum("pij,pj->pi", rotation[piece], subjects.source) + translation[piece]
    square = subjects.weight * (rigid - subjects.moved).square().sum(-1)
    mean = _sum_by(square, piece, pieces) / _sum_by(subjects.weight, piece, pieces)
    is_zero = mean == 0
    error = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, mean).sqrt()) / subjects.size
    return _mean_by(error[piece], torch.ones_like(piece, dtype=torch.bool), subjects.clip, clips)


def _landing_gap(
    subjects: _Subjects,
    prediction: GeometryPrediction,
    depth: Float[Tensor, "B S H W"],
    surface: Bool[Tensor, "B S H W"],
    valid: Bool[Tensor, " B"],
) -> tuple[Float[Tensor, " P"], Bool[Tensor, " P"]]:
    """How far each moved point lies behind the surface that the next view sees there (negative: in front), in sizes of
    its piece, and where that could be read."""
    batch, views, height, width = depth.shape
    pairs = batch * (views - 1)
    clip = valid[:, None, None, None]
    cameras = torch.where(clip, prediction.cam2world, torch.eye(4).to(prediction.cam2world))[:, 1:].flatten(0, 1)
    intrinsics = torch.where(clip, prediction.intrinsics, torch.eye(3).to(prediction.intrinsics))[:, 1:].flatten(0, 1)
    # All pixels of a pair have a place, so that pairs form a batch; those that are no subject are never read out.
    points = torch.zeros(pairs * height * width, 3).to(subjects.moved).index_copy(0, subjects.place, subjects.moved)
    uv, z = project(points.view(pairs, -1, 3), intrinsics[:, None], cameras[:, None])  # (pairs, 1, H W, ...)
    inverse, readable = read_inverse_depth(
        depth[:, 1:].reshape(pairs, 1, height, width), surface[:, 1:].reshape(pairs, 1, height, width), uv
    )
    gap = (z - 1 / inverse).flatten()[subjects.place] / subjects.size[subjects.piece]
    return gap, (readable & (z > 0)).flatten()[subjects.place]


def _mean_by(
    values: Float[Tensor, " P"], mask: Bool[Tensor, " P"], clip: Int[Tensor, " P"], clips: int
) -> Float[Tensor, " B"]:
    """Mean of each clip's masked values, 0 where there is none."""
    total = _sum_by(torch.where(mask, values, torch.zeros_like(values)), clip, clips)
    return total / _sum_by(mask.to(values), clip, clips).clamp_min(1)


@full_precision
def subject_rigidity(
    prediction: GeometryPrediction,
    *,
    context: RewardContext | None = None,
    confidence_threshold: NonNegativeFloat = 0.1,
    edge_threshold: NonNegativeFloat = 0.03,
    edge_radius: NonNegativeInt = 1,
    min_pixels: PositiveInt = 12,
    hidden: NonNegativeFloat = 0.25,
) -> Reward:
    """How rigidly the subjects of each clip move; the module's docstring has the definition.

    Args:
        prediction: geometry of B clips with `scene_flow` and `subject_mask`.
        context: unused; part of every reward's signature.
        confidence_threshold: pixels under it are left out.
        edge_threshold: see `depth_edges`; outlines are left out, because depth and flow are mixtures there.
        edge_radius: pixels by which edges grow.
        min_pixels: smaller pieces are not judged.
        hidden: how far behind the next view's surface, in sizes of the subject, a point may lie and still count.

    Returns:
        The reward in (0, 1]; terms `e_rigid`, `e_shape`, `subject_pixels` (share of all pixels judged) and `followed`
        (share of those whose landing place could be compared).

    Raises:
        UserError: when the geometry model predicts no scene flow or no subject mask.
    """
    del context
    for name in ("scene_flow", "subject_mask"):
        if getattr(prediction, name) is None:
            raise UserError(
                f"subject_rigidity needs a geometry model with a {name}; leave this reward out of the recipe"
            )
    batch, views, height, width = prediction.depth.shape
    valid = finite_clips(prediction)
    usable = usable_pixels(prediction, confidence_threshold) & valid[:, None, None, None]
    depth = torch.where(usable, prediction.depth, torch.ones_like(prediction.depth))
    if views < 2:
        nothing = depth.flatten(1).sum(1) * 0
        terms = dict.fromkeys(("e_rigid", "e_shape", "subject_pixels", "followed"), nothing)
        return judged(nothing, terms, torch.zeros_like(valid))
    edges = depth_edges(depth.detach(), threshold=edge_threshold, radius=edge_radius, mask=usable)
    surface = usable & ~edges
    subjects = _find_subjects(prediction, surface, depth, min_pixels)
    gap, readable = _landing_gap(subjects, prediction, depth, surface, valid)
    counted = readable & (gap.detach() <= hidden)
    e_rigid, e_shape = _rigid_error(subjects, batch), _mean_by(gap.abs(), counted, subjects.clip, batch)
    pixels, followed = (_sum_by(mask.to(gap), subjects.clip, batch) for mask in (torch.ones_like(counted), counted))
    value = 0.5 * (1 / (1 + e_rigid) + 1 / (1 + e_shape))
    terms = {
        "e_rigid": e_rigid,
        "e_shape": e_shape,
        "subject_pixels": pixels / ((views - 1) * height * width),
        "followed": followed / pixels.clamp_min(1),
    }
    return judged(value, terms, valid & (followed > 0) & value.isfinite())
