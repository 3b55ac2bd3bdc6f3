"""What each table of the paper compares: arms, prompt sets, and what the paper found.

An arm is what it changes: config fields of training (on top of the recipe), how it samples, or both. Arms of one name
are one run, so tables share what they have in common.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vggrpo.config import TrainConfig

_MOTION, _GEOMETRY = "camera_motion_smoothness", "geometry_reprojection_consistency"
_HINGE, _PRESENCE = "camera_motion_hinge", "subject_presence_hinge"


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Attributes:
        name: also of its run.
        about: one sentence.
        train: config overrides of its training; None: the base model.
        without: rewards of the recipe that it drops; the others keep their weights and options.
        lgm: overrides of the LGM recipe: rewards are read through an LGM that is trained with them; None: the shipped
            (or configured) one.
        seconds_of: the arm that it trains as long as, by its seconds; "": for as many videos as the GRPO recipe.
        clips_of: of an arm with `seconds_of` that makes its clips beforehand, the same arm at equal videos: its seconds
            say how many clips fit. "": its updates go on until the seconds are over.
        lora_of: the arm whose LoRA it samples with; "": its own (or none, if it is not trained).
        guidance: scale of latent reward guidance; None: none. 0 must change nothing, and that is checked.
        guided_every: steps between two guided ones; None: the paper's share of the steps.
        detach: guidance without the video model's gradient.
        candidates: best of so many.
        group: factor on K; prompts per update (or updates) change so that the videos stay as many.
    """

    name: str
    about: str
    train: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    lgm: tuple[str, ...] | None = None
    seconds_of: str = ""
    clips_of: str = ""
    lora_of: str = ""
    guidance: float | None = None
    guided_every: int | None = None
    detach: bool = False
    candidates: int = 1
    group: float = 1.0


@dataclass(frozen=True)
class Table:
    """A comparison of arms with the base model on prompt sets; `claim` is what the paper found."""

    title: str
    claim: str
    arms: tuple[Arm, ...]
    sets: tuple[str, ...] = ("world-static", "world-dynamic")


VGGRPO = Arm("vggrpo", "GRPO on the motion and the geometry reward, read from latents", ())
RIVALS = (
    Arm("sft", "flow matching on the base model's best clips", ("algorithm=sft",)),
    Arm("dpo-epipolar", "flow-DPO, pairs by the Sampson error of matches", ("algorithm=dpo",)),
    Arm("dpo-geometry", "flow-DPO, pairs by reprojection in RGB", ("algorithm=dpo", "dpo.pairs=geometry")),
    VGGRPO,
    Arm("nft", "forward-process RL on the same rewards", ("algorithm=nft",)),
    Arm("direct", "backpropagation of the same rewards", ("algorithm=direct",)),
)
FAR = (
    Arm("far", "the recipe, trained far past its end", ()),
    # A KL of weight 0 would not be measured; this one is, and does not act.
    Arm("far-bare", "the same without KL and hinges", ("grpo.kl=1e-9",), without=(_HINGE, _PRESENCE)),
)
"""Arms of the study of reward hacking."""
LGM_RECIPE = Arm("lgm-recipe", "an LGM by the short recipe: rendered and generated clips, a view per latent frame",
                 (), lgm=())  # fmt: skip
EVERY_FRAME = Arm("lgm-every-frame", "the same, a view per RGB frame", (), lgm=("stitch.view_rate=frame",))
STITCHED = (
    LGM_RECIPE,
    *(Arm(f"lgm-layer-{n}", f"the same, stitched after layer {n}", lgm=(f"stitch.layer={n}",)) for n in (1, 2)),
    EVERY_FRAME,
)
"""LGMs of the study of stitching."""


def _as_long(arm: Arm) -> Arm:
    beforehand = not {"algorithm=sft", "algorithm=dpo"}.isdisjoint(arm.train or ())
    return replace(
        arm,
        name=f"{arm.name}-seconds",
        about=f"{arm.about}, as long as VGGRPO",
        seconds_of=VGGRPO.name,
        clips_of=arm.name if beforehand else "",
    )


TABLES: dict[str, Table] = {
    "main": Table(
        "Main comparison",
        "VGGRPO is ahead of SFT and of both DPO rivals on static and on dynamic prompts.",
        RIVALS,
    ),
    "main-seconds": Table(
        "Main comparison, equal seconds of training",
        "VGGRPO is ahead of SFT and of both DPO rivals on static and on dynamic prompts.",
        tuple(arm if arm is VGGRPO else _as_long(arm) for arm in RIVALS),
    ),
    "rewards": Table(
        "Ablation of the rewards and of the update",
        "The motion reward alone steadies the camera while the structure still breaks; with both, both hold.",
        (
            Arm("motion-only", "the motion reward alone", (f"rewards.{_GEOMETRY}.weight=0",)),
            Arm("geometry-only", "the geometry reward alone", (f"rewards.{_MOTION}.weight=0",)),
            VGGRPO,
            Arm("summed", "one normalisation of the summed rewards", ("grpo.mode=sum",)),
            Arm("no-kl", "no KL to the base model", ("grpo.kl=0",)),
            Arm("no-hinge", "no hinge on the camera's travel", (), without=(_HINGE,)),
            Arm("no-presence", "no hinge on the share of subjects", (), without=(_PRESENCE,)),
            Arm("paper-rewards", "the paper's two rewards with their default options, no hinges",
                (f"rewards={{{_MOTION}: 1.0, {_GEOMETRY}: 1.0}}",)),
            Arm("half-groups", "K halved, as many videos in all", (), group=0.5),
            Arm("double-groups", "K doubled, as many videos in all", (), group=2.0),
            Arm("adherence", "and the camera goes where the prompt sends it", ("rewards.camera_adherence=0.5",)),
            Arm("rigidity", "and subjects keep their shape", ("rewards.subject_rigidity=0.5",)),
        ),
    ),
    "geometry": Table(
        "Ablation of the geometry model",
        "4D geometry, which knows what moves, matters on dynamic prompts; RGB rewards cost more and are no better.",
        (
            VGGRPO,
            Arm("static-masks", "nothing is masked, as with a static geometry model",
                (f"rewards.{_GEOMETRY}.options.movers=none",)),
            Arm("flow-masks", "what scene flow calls moving is masked, as in the paper",
                (f"rewards.{_GEOMETRY}.options.movers=dynamic",)),
            Arm("rgb", "the rewards read decoded frames", ("reward.space=rgb",)),
        ),
        ("world-dynamic", "world-static"),
    ),
    "lgm": Table(
        "Ablation of the LGM that the rewards are read through",
        "Generated clips among the training data close the gap to generated latents.",
        (
            VGGRPO,
            LGM_RECIPE,
            Arm("lgm-rendered-only", "the same, trained without generated clips", (), lgm=("clips.generated_share=0",)),
            EVERY_FRAME,
        ),
    ),
    "generalisation": Table(
        "Prompts of another style than those of training",
        "The gain carries over to standard benchmark prompts.",
        (VGGRPO,),
        ("world-static", "world-dynamic", "static", "dynamic"),
    ),
    "guidance": Table(
        "Test-time latent reward guidance",
        "Guidance improves base and tuned models without training.",
        (
            Arm("guided-0", "guidance, scale 0: must be the base model, bit for bit", guidance=0.0),
            Arm("guided-100", "guidance, scale 100", guidance=100.0),
            Arm("guided-300", "guidance, scale 300", guidance=300.0),
            Arm("guided-1000", "guidance, scale 1000", guidance=1000.0),
            Arm("guided-1000-often", "guidance, scale 1000, at every second step", guidance=1000.0, guided_every=2),
            Arm("guided-100-detached", "scale 100 without the video model's gradient", guidance=100.0, detach=True),
            Arm("best-of-4", "the best of 4 candidates by the same reward", candidates=4),
            VGGRPO,
            Arm("vggrpo-guided-100", "VGGRPO and guidance", lora_of="vggrpo", guidance=100.0),
            Arm("vggrpo-guided-1000-often", "VGGRPO and guidance, scale 1000, at every second step", lora_of="vggrpo",
                guidance=1000.0, guided_every=2),
        ),
    ),
}  # fmt: skip


def arm_named(name: str) -> Arm:
    """The arm of that name in any table."""
    return next(arm for table in TABLES.values() for arm in table.arms if arm.name == name)


STUDIES = {
    "efficiency": "Cost of a reward: through latents and through RGB frames",
    "robustness": "What noise on the latents does to the LGM and to decode-then-geometry",
    "stitch": "Where an LGM is stitched, and how many views it reads",
    "hacking": "Training far past the optimum: which watch sees it first",
}
"""Recipes that are no comparison of arms. The first two train nothing: `vggrpo analyze-lgm` answers them."""


def kept_rewards(config: TrainConfig, without: Sequence[str]) -> list[str]:
    """Overrides that drop rewards of a recipe; none where it has none of them."""
    kept = {name: term.model_dump(mode="json") for name, term in config.rewards.items() if name not in without}
    return [f"rewards={json.dumps(kept)}"] if len(kept) < len(config.rewards) else []


def equal_budget(config: TrainConfig, prompts: int, group: float = 1.0, clips: float = 1.0) -> list[str]:
    """Overrides that give an arm the videos of the GRPO recipe, and its gradient samples (videos x trained steps).

    Two exceptions have fewer gradient samples. SFT and DPO see their clips once: on the embedded world more passes made
    both worse (docs/results.md). Direct training takes its gradient through the last step alone.

    Args:
        config: of the arm, with the GRPO section of the recipe.
        prompts: training prompts; the offline rivals share the videos out among them.
        group: factor on K.
        clips: factor on the clips of the offline rivals, and so on their one pass; rounded down, at least two a prompt,
            the fewest that leave a choice.
    """
    grpo, window = config.grpo, config.sampling.window
    per_update = grpo.prompts_per_update * grpo.samples_per_prompt
    videos = config.updates * per_update
    samples = max(1.0, clips) * videos * window
    candidates = max(2, math.floor(clips * max(2, round(videos / prompts))))
    size = max(2, round(grpo.samples_per_prompt * group))
    groups = max(1, round(grpo.prompts_per_update / group))

    def updates(count: float, each: int) -> str:
        return f"updates={max(1, round(count / each))}"

    kept = prompts * math.ceil(config.sft.keep * candidates)
    pairs = max(1, candidates // 4)  # the best quarter of a prompt's clips against the worst
    return {
        "grpo": [
            f"grpo.samples_per_prompt={size}",
            f"grpo.prompts_per_update={groups}",
            updates(videos, size * groups),
        ],
        "sft": [f"sft.candidates={candidates}", "sft.batch=16", updates(min(samples, kept), 16)],
        "dpo": [
            f"dpo.candidates={candidates}",
            f"dpo.pairs_per_prompt={pairs}",
            "dpo.batch=8",
            updates(min(samples, 2 * prompts * pairs), 16),
        ],
        "nft": [
            f"nft.prompts_per_update={grpo.prompts_per_update}",
            f"nft.samples_per_prompt={grpo.samples_per_prompt}",
            f"nft.times={window}",
        ],
        "direct": [
            f"direct.prompts_per_update={grpo.prompts_per_update}",
            "direct.samples_per_prompt=2",
            updates(videos, 2 * grpo.prompts_per_update),
        ],
    }[config.algorithm]
