"""`vggrpo generate`: videos from a prompt file, with or without a LoRA, same seeds for both."""

from __future__ import annotations

import argparse
from pathlib import Path

from vggrpo.commands.arguments import GO_ON, Subparsers, at_least, image_size


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
    parser.add_argument("--output", type=Path, required=True, help="directory for the videos and manifest.jsonl")
    parser.add_argument("--pipeline", default="embedded", help="a diffusers Wan directory (default: %(default)s)")
    parser.add_argument("--lora", type=Path, help="a LoRA directory or file, such as OUTPUT/lora of a training run")
    parser.add_argument("--arm", help="name of the arm in the manifest (default: tuned with --lora, else base)")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="videos a prompt (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="classifier-free guidance, 1 = none")
    parser.add_argument("--frames", type=at_least(1), default=17, help="frames, 4n+1 (default: %(default)s)")
    parser.add_argument(
        "--size", type=image_size, default=(64, 64), metavar="N|HxW", help="pixels, 64 or 480x832 (default: 64)"
    )
    parser.add_argument("--fps", type=float, default=8.0, help="frames a second in the file (default: %(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=8, help="videos at once (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.set_defaults(run=run, resume=GO_ON)


def run(arguments: argparse.Namespace) -> None:
    """Read the prompts before anything is loaded, then generate."""
    from vggrpo.io.prompts import read_prompts

    prompts = read_prompts(arguments.prompts)
    from vggrpo.sampling.generate import generate_videos

    manifest = generate_videos(
        prompts,
        arguments.output,
        pipeline=arguments.pipeline,
        lora=arguments.lora,
        arm=arguments.arm or ("tuned" if arguments.lora else "base"),
        seeds=range(arguments.seed, arguments.seed + arguments.seeds),
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        num_frames=arguments.frames,
        size=arguments.size,
        fps=arguments.fps,
        micro_batch=arguments.batch,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    print(f"videos listed in {manifest}")
