"""`vggrpo generate`: videos from a prompt file, with or without a LoRA, same seeds for both."""

from __future__ import annotations

import argparse
from pathlib import Path

from vggrpo.commands.arguments import (
    GO_ON,
    Subparsers,
    add_device,
    at_least,
    frame_rate,
    guidance_scale,
    image_size,
    number,
    seed,
)
from vggrpo.errors import UserError


def add_parser(subparsers: Subparsers) -> None:
    """Add `generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="videos from a prompt file, with or without a LoRA",
        description=(
            "Generate videos with a deterministic sampler. The noise of a video follows from its prompt's place in the "
            "file and its seed alone, so two calls that differ only in --lora give pairs for `vggrpo compare`. Videos "
            "that are there already are not made again."
        ),
    )
    parser.add_argument("--prompts", type=Path, required=True, help="UTF-8 text file, one prompt a line")
    parser.add_argument(
        "--first-frames",
        type=Path,
        metavar="FILE",
        help="text file with one image a line, line n for prompt n: the videos start from them (Wan2.2-TI2V)",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory for the videos and manifest.jsonl")
    parser.add_argument("--pipeline", default="embedded", help="a diffusers Wan directory (default: %(default)s)")
    parser.add_argument("--lora", type=Path, help="what training exported: OUTPUT/lora, or OUTPUT/transformer")
    parser.add_argument("--arm", help="name of the arm in the manifest (default: tuned with --lora, else base; with "
                        "-guided and -bestN behind it)")  # fmt: skip
    parser.add_argument("--seeds", type=at_least(1), default=1, help="videos a prompt (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=guidance_scale, default=1.0, help="classifier-free guidance, 1 = none")
    parser.add_argument("--frames", type=at_least(1), default=17, help="frames, 4n+1 (default: %(default)s)")
    parser.add_argument(
        "--size", type=image_size, default=(64, 64), metavar="N|HxW", help="pixels, 64 or 480x832 (default: 64)"
    )
    parser.add_argument(
        "--fps", type=frame_rate, default=8.0, help="frames a second in the file (default: %(default)s)"
    )
    parser.add_argument("--batch", type=at_least(1), default=8, help="videos at once (default: %(default)s)")
    add_device(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    _add_steering(parser)
    parser.set_defaults(run=run, resume=GO_ON)


def _add_steering(parser: argparse.ArgumentParser) -> None:
    """What a reward read from latents may do while videos are made."""
    group = parser.add_argument_group(
        "latent reward", "steer sampling by a reward, without training; what a video cost is in OUTPUT/ARM/cost.json"
    )
    group.add_argument("--guidance", type=number(0), default=0.0, metavar="SCALE", help="strength of guidance, 0 = off")
    group.add_argument("--guidance-every", type=at_least(1), default=20, metavar="N", help="guide every N-th step "
                       "(default: %(default)s)")  # fmt: skip
    group.add_argument("--guidance-detach", action="store_true", help="keep the gradient out of the video model: "
                       "faster, less memory, less exact")  # fmt: skip
    group.add_argument("--best-of", type=at_least(1), default=1, metavar="N", help="keep the best of N candidates")
    group.add_argument("--reward", action="append", metavar="NAME[=WEIGHT]", help="may be repeated (default: "
                       "camera_motion_smoothness and geometry_reprojection_consistency)")  # fmt: skip
    group.add_argument("--recipe", metavar="NAME", help="training recipe whose reward options are used (default: none, "
                       "the rewards' own)")  # fmt: skip
    group.add_argument("--lgm", default="embedded", help="directory of the latent geometry model")


def _weights(texts: list[str] | None) -> dict[str, float]:
    """`NAME[=WEIGHT]` of each --reward."""
    weights = {}
    for text in texts or ["camera_motion_smoothness", "geometry_reprojection_consistency"]:
        name, equals, weight = text.partition("=")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise UserError(
                f"--reward {text}: {weight!r} is no number; write NAME=WEIGHT, such as {name}=0.5"
            ) from None
    return weights


def _arm(arguments: argparse.Namespace) -> str:
    """base or tuned, with -guided and -bestN behind it."""
    name = "tuned" if arguments.lora else "base"
    name += "-guided" if arguments.guidance else ""
    return name + (f"-best{arguments.best_of}" if arguments.best_of > 1 else "")


def run(arguments: argparse.Namespace) -> None:
    """Read the prompts before anything is loaded, then generate."""
    from vggrpo.io.prompts import read_prompts

    prompts = read_prompts(arguments.prompts)
    first_frames = None
    if arguments.first_frames is not None:
        from vggrpo.io.images import read_image_list

        first_frames = read_image_list(arguments.first_frames, len(prompts))
    from vggrpo.sampling.generate import generate_videos

    steering = None
    for option in ("reward", "recipe"):
        if getattr(arguments, option) and not arguments.guidance and arguments.best_of == 1:
            raise UserError(
                f"--{option} says what to steer by; give --guidance SCALE or --best-of N as well, or leave it out"
            )
    if arguments.guidance != 0 or arguments.best_of > 1:
        from vggrpo.config import load_config
        from vggrpo.models.loading import latent_spec, pick_device
        from vggrpo.posttraining.trainer import load_lgm
        from vggrpo.rewards.latent import WeightedLatentReward
        from vggrpo.rewards.registry import recipe_options
        from vggrpo.sampling.guidance import RewardGuidance
        from vggrpo.sampling.steering import Steering

        weights = _weights(arguments.reward)
        options = {} if arguments.recipe is None else recipe_options(load_config(arguments.recipe).rewards, weights)
        lgm = load_lgm(arguments.lgm, pick_device(arguments.device), latent_spec(arguments.pipeline))
        reward = WeightedLatentReward(lgm, weights, options)
        guidance = RewardGuidance(
            reward, arguments.guidance, every=arguments.guidance_every, detach_velocity=arguments.guidance_detach
        )
        name = f"{arguments.lgm}: " + " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
        steering = Steering(reward, name, guidance, arguments.best_of, options)
    manifest = generate_videos(
        prompts,
        arguments.output,
        pipeline=arguments.pipeline,
        lora=arguments.lora,
        arm=arguments.arm or _arm(arguments),
        seeds=range(arguments.seed, arguments.seed + arguments.seeds),
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        num_frames=arguments.frames,
        size=arguments.size,
        fps=arguments.fps,
        micro_batch=arguments.batch,
        device=arguments.device,
        dtype=arguments.dtype,
        steering=steering,
        first_frames=first_frames,
    )
    print(f"videos listed in {manifest}")
