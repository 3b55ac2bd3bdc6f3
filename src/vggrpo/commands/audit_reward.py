"""`vggrpo audit-reward`: is this reward signal or noise?"""

from __future__ import annotations

import argparse
from pathlib import Path

from vggrpo.commands.arguments import START_AGAIN, Subparsers, add_device, at_least, guidance_scale, image_size, seed


def add_parser(subparsers: Subparsers) -> None:
    """Add `audit-reward`."""
    parser = subparsers.add_parser(
        "audit-reward",
        help="is this reward signal or noise? ask before training on it",
        description=(
            "Measure an LGM's rewards on rendered clips whose truth is known and on clips of a generator: the floor on "
            "consistent clips, the response to injected shake and wobble, the agreement with an independent judge."
        ),
    )
    parser.add_argument("--lgm", default="embedded", help="directory of an LGM (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/audit"), help="directory (default: %(default)s)")
    parser.add_argument("--clips", type=at_least(8), default=96, help="clips of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--video-model", help="pipeline whose latents the LGM reads (default: the embedded one)")
    parser.add_argument("--judge", help="geometry model that the LGM was not made from (default: the embedded one)")
    parser.add_argument("--frames", type=at_least(3), default=17, help="RGB frames a clip (default: %(default)s)")
    parser.add_argument("--size", type=image_size, default=(64, 64), help="HEIGHTxWIDTH of the clips (default: 64)")
    parser.add_argument("--prompts", help="text file of the generated clips' prompts (default: the embedded world's)")
    parser.add_argument("--steps", type=at_least(1), default=10, help="of the generated clips (default: %(default)s)")
    parser.add_argument(
        "--guidance-scale", type=guidance_scale, default=1.0, help="of the generated clips (default: 1, none)"
    )
    parser.add_argument("--batch", type=at_least(1), default=8, help="clips at once (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the video model (default: %(default)s)"
    )
    parser.add_argument(
        "--recipe", default="tiny", help="training recipe whose reward options are asked about (default: %(default)s)"
    )
    add_device(parser)
    parser.set_defaults(run=run, resume=START_AGAIN)


def run(arguments: argparse.Namespace) -> None:
    """Audit; the function prints its table and writes it."""
    from vggrpo.config import load_config
    from vggrpo.evaluation.audit import audit_reward
    from vggrpo.io.prompts import read_prompts
    from vggrpo.models.loading import pick_device
    from vggrpo.rewards.registry import audited_options

    audit_reward(
        arguments.lgm,
        arguments.output,
        clips=arguments.clips,
        seed=arguments.seed,
        batch=arguments.batch,
        video_model=arguments.video_model,
        judge=arguments.judge,
        num_frames=arguments.frames,
        size=arguments.size,
        prompts=None if arguments.prompts is None else read_prompts(arguments.prompts),
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        dtype=arguments.dtype,
        options=audited_options(load_config(arguments.recipe).rewards),
        device=pick_device(arguments.device),
    )
