"""Flow-DPO on preference pairs of the base model's clips: the paper's two strongest rivals, by what makes the pairs.

    loss = -log sigmoid( -beta/2 [ (err_w - err_w_ref) - (err_l - err_l_ref) ] ),   err = |v - (eps - x0)|^2 / dims

with one time and one noise for both clips of a pair. The pairs are made once, before the first update, and kept in
`OUTPUT/clips` (`pairs.py`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.batches import items_of, mean_over_processes, share_of
from vggrpo.posttraining.forward_losses import drawn_times, flow_dpo_loss, network_input, velocity_error
from vggrpo.posttraining.pairs import Pairs, build_pairs
from vggrpo.posttraining.sft import FINE
from vggrpo.sampling.seeds import derive_seed, seeded_noise
from vggrpo.tracking import Stopwatch


class DPO:
    """Preference optimisation on stored pairs."""

    needs_lgm: ClassVar[bool] = True  # pairs `latent` are made with it, and validation shows its rewards

    def __init__(self, context: Context) -> None:
        self.context, self.settings = context, context.config.dpo
        self.sigmas = context.model.sigmas(FINE, context.config.sampling.shift)
        self._pairs: Pairs | None = None

    def state(self) -> dict[str, Any]:
        """Nothing: the pairs are on disk, and everything else follows from the seed."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `state`."""

    def update(self, number: int, watch: Stopwatch) -> dict[str, float]:
        """One optimizer step on `dpo.batch` pairs."""
        context, settings, seed = self.context, self.settings, self.context.config.seed
        with watch.stage("pairs"):
            self._pairs = self._pairs or build_pairs(context)
        pairs = self._pairs
        chosen = items_of(number, settings.batch, len(pairs), seed)
        mine = [(place, chosen[place]) for place in share_of(context, settings.batch)]
        times = drawn_times(settings.batch, self.sigmas, torch.Generator().manual_seed(derive_seed(seed, "t", number)))
        rows: list[Tensor] = []
        with watch.stage("backward"):
            for start in range(0, len(mine), settings.micro_batch):
                part = mine[start : start + settings.micro_batch]
                winner, loser, prompts = pairs.read([pair for _, pair in part], context.model.device)
                noise = [derive_seed(seed, "dpo", number, place) for place, _ in part]
                loss, margin = self._loss(winner, loser, prompts, times[[place for place, _ in part]], noise)
                (loss.sum() / settings.batch).backward()
                rows.append(torch.stack([loss.detach(), (margin < 0).to(loss), margin]))
        loss, accuracy, margin = (mean_over_processes(context, row) for row in torch.cat(rows, dim=1))
        with watch.stage("optimizer"):
            norm = context.policy.step(number, loss=loss)
        return {
            "loss": loss,
            "preference_accuracy": accuracy,
            "margin": margin,
            "grad_norm": norm,
            "learning_rate": context.policy.learning_rate,
            "pairs": float(len(pairs)),
            "pairs/refused": float(pairs.refused),
            "videos": float(len(set(context.prompts)) * settings.candidates if number == 0 else 0),
        }

    def _loss(
        self, winner: Tensor, loser: Tensor, prompts: list[str], t: Tensor, noise: list[int]
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Loss a pair, and by how much the policy's error on the winner fell against that on the loser (< 0: well)."""
        model, context = self.context.model, self.context
        eps = seeded_noise(noise, winner.shape[1:], model.device).repeat(2, 1, 1, 1, 1)
        t = t.to(model.device).repeat(2)
        x0 = torch.cat([winner, loser])
        state, times, mask = network_input(x0, eps, t, pinned=context.conditions.has_first_frames)
        target = eps - x0
        text = context.conditions.text(prompts, model.device).repeat(2, 1, 1)
        # The reference goes first: switching the adapter off and on must not happen between forward and backward.
        with torch.no_grad(), context.policy.reference():
            reference = velocity_error(model.predict_velocity(state, times, text), target, mask).chunk(2)
        error = velocity_error(model.predict_velocity(state, times, text), target, mask).chunk(2)
        loss = flow_dpo_loss(error[0], error[1], reference[0], reference[1], self.settings.beta)
        return loss, ((error[0] - reference[0]) - (error[1] - reference[1])).detach()
