"""`vggrpo train`: post-training from a recipe."""

from __future__ import annotations

import argparse
import os

from vggrpo.commands.arguments import GO_ON, Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add `train`."""
    parser = subparsers.add_parser(
        "train",
        help="post-train a video model; the result is a LoRA for diffusers",
        description=(
            "Post-train from a recipe. The LoRA is in OUTPUT/lora/pytorch_lora_weights.safetensors (all weights, with "
            "model.tune=full, in OUTPUT/transformer); checkpoints "
            "and logs lie beside it, and the same command goes on from the last checkpoint. For several GPUs: "
            "torchrun --nproc-per-node N -m vggrpo.cli train CONFIG."
        ),
    )
    parser.add_argument("config", help="a YAML file, or the name of a shipped recipe such as tiny")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config fields to change, such as updates=20 grpo.kl=0.01 output=runs/a",
    )
    parser.set_defaults(run=run, resume=GO_ON)


def run(arguments: argparse.Namespace) -> None:
    """Load the config first (it imports no torch, so that a typo costs nothing), then train."""
    from vggrpo.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    from vggrpo.distributed import announced
    from vggrpo.posttraining import train

    exported = train(config)
    if announced(os.environ)[0] == 0:  # one of several processes speaks for all
        print(f"weights in {exported}")
