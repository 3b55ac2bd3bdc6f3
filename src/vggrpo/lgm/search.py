"""Where to stitch, and with which weights: ridge regression from latents to the tokens of every candidate layer.

All layers are fitted in one pass.

`W = (X'X + n lam I)^-1 X'Y` with X the 5x5x5 neighbourhoods of the latents (zero-padded as at run time) and a constant
for the joint bias. The solution of the chosen layer IS the connector's initialisation.

White noise E of standard deviation s on the latents needs no sample: E[(X + E)'(X + E)] = X'X + s^2 D, with D how often
each place of the kernel lay inside the clip, and E[(X + E)'Y] = X'Y. So `noise` makes the very map that least squares
over endlessly many noisy copies of the clips would give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write
from vggrpo.lgm.connector import KERNEL, PADDING, Connector
from vggrpo.models.base import GeometryModel

Pair = tuple[Float[Tensor, "B C S H W"], Float[Tensor, "B S 3 H8 W8"]]


@dataclass
class StitchFit:
    """The closed-form connector of one layer.

    Attributes:
        weight: (d, C, 5, 5, 5).
        bias: (d,).
        special: mean special tokens of the first view and of the others, (2, M, d).
        r2: held-out share of the tokens' variance that the connector explains.
        origin: digest of what the search depended on; empty: not recorded.
    """

    layer: int
    weight: Tensor
    bias: Tensor
    special: Tensor
    r2: float
    origin: str = ""

    def load_into(self, connector: Connector) -> None:
        with torch.no_grad():
            connector.conv.weight.copy_(self.weight)
            connector.conv.bias.copy_(self.bias)


def neighbourhoods(latents: Float[Tensor, "B C S H W"], stride: int) -> Float[Tensor, "N C125_1"]:
    """Rows of X: for each token, the latents under the connector's kernel, then a 1."""
    x = F.pad(latents, (PADDING,) * 6)
    x = x.unfold(2, KERNEL, 1).unfold(3, KERNEL, stride).unfold(4, KERNEL, stride)  # (B, C, S, h, w, 5, 5, 5)
    rows = x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def _inside(latents: Float[Tensor, "B C S H W"], stride: int) -> Float[Tensor, " C125"]:
    """How many tokens of one clip see each place of their kernel inside the clip: the same for every channel."""
    places = neighbourhoods(torch.ones_like(latents[:1, :1]), stride)[:, :-1].double().sum(0)
    return places.repeat(latents.shape[1])


@torch.no_grad()
def search_layers(
    geometry: GeometryModel,
    train: Iterable[Pair],
    heldout: Iterable[Pair],
    stride: int,
    layers: list[int] | None = None,
    ridge: float = 1e-3,
    noise: float = 0.0,
) -> list[StitchFit]:
    """Fit every layer of `layers` (default: all stitch points) and score it on held-out clips; best R^2 first.

    Args:
        train, heldout: pairs of latents at view rate and the RGB views of the same clips.
        ridge: relative to each column's mean square, so that channels of little spread are not shrunk for it.
        noise: standard deviation of white noise on the latents (as they are given here) that the map shall bear.
    """
    layers = sorted(set(geometry.stitch_points() if layers is None else layers))
    gram = inside = torch.zeros((), dtype=torch.float64)
    cross, specials, count = [gram] * len(layers), [gram] * len(layers), 0
    for latents, frames in train:
        rows = neighbourhoods(latents, stride)
        # Products in float32, sums in float64: millions of rows lose digits otherwise.
        gram = gram + (rows.T @ rows).double()
        inside = inside + len(latents) * _inside(latents, stride)
        for i, (tokens, special) in enumerate(_targets(geometry, frames, layers)):
            cross[i] = cross[i] + (rows.T @ tokens).double()
            specials[i] = specials[i] + special.double() * len(frames)
        count += len(frames)
    squares = gram.diagonal()
    penalty = ridge * squares.clamp_min(1e-6 * squares[:-1].mean())
    penalty[:-1] += noise**2 * inside
    penalty[-1] = 0.0  # the bias is free
    dims = [geometry.embed_dim(layer) for layer in layers]
    solutions = torch.linalg.solve(gram + torch.diag(penalty), torch.cat(cross, 1)).float().split(dims, 1)
    score = _held_out_r2(geometry, heldout, layers, stride, solutions)
    fits = []
    for layer, w, special, r2 in zip(layers, solutions, specials, score, strict=True):
        weight = w[:-1].T.reshape(len(w.T), -1, KERNEL, KERNEL, KERNEL)
        fits.append(StitchFit(layer, weight.contiguous(), w[-1].clone(), (special / count).float(), r2))
    return sorted(fits, key=lambda fit: -fit.r2)


def _targets(
    geometry: GeometryModel, frames: Tensor, layers: list[int]
) -> Iterator[tuple[Float[Tensor, "N D"], Float[Tensor, "2 M D"]]]:
    """Patch tokens and mean special tokens of one layer after the other, in rising order: at full shape one layer's
    take half a gigabyte a clip, and those of all would not fit."""
    for layer, tokens in zip(range(layers[-1] + 1), geometry.walk(frames), strict=False):
        if layer in layers:
            m = geometry.special_tokens(layer).shape[1]
            special = torch.stack([tokens[:, 0, :m].mean(0), tokens[:, 1:, :m].mean((0, 1))])
            yield tokens[:, :, m:].flatten(0, 2), special


def _held_out_r2(
    geometry: GeometryModel, pairs: Iterable[Pair], layers: list[int], stride: int, solutions: Sequence[Tensor]
) -> list[float]:
    """1 - residual / variance over held-out tokens, one number a layer."""
    zero = torch.zeros((), dtype=torch.float64)
    residual, total, first, rows_seen = [zero] * len(layers), [zero] * len(layers), [zero] * len(layers), 0
    for latents, frames in pairs:
        rows = neighbourhoods(latents, stride)
        for i, (tokens, _) in enumerate(_targets(geometry, frames, layers)):
            residual[i] = residual[i] + (tokens - rows @ solutions[i]).double().square().sum()
            total[i] = total[i] + tokens.double().square().sum()
            first[i] = first[i] + tokens.double().sum(0)
        rows_seen += len(rows)
    return [1 - (r / (t - f.square().sum() / rows_seen)).item() for r, t, f in zip(residual, total, first, strict=True)]


def save_fit(path: Path, fit: StitchFit) -> None:
    """Write one fit as safetensors, atomically."""
    tensors = {"weight": fit.weight, "bias": fit.bias, "special": fit.special}
    about = {"layer": str(fit.layer), "r2": repr(fit.r2), "origin": fit.origin}
    atomic_write(path, save({name: value.cpu().contiguous() for name, value in tensors.items()}, about))


def load_fit(path: Path) -> StitchFit:
    """Read what `save_fit` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in ("weight", "bias", "special")}
            return StitchFit(int(about["layer"]), **tensors, r2=float(about["r2"]), origin=about.get("origin", ""))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is damaged; delete it: the layer search is run again") from error
