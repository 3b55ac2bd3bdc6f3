"""`vggrpo train-lgm`: a Latent Geometry Model for a video model, from a recipe."""

from __future__ import annotations

import argparse
import os

from vggrpo.commands.arguments import GO_ON, Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add `train-lgm`."""
    parser = subparsers.add_parser(
        "train-lgm",
        help="stitch a video model's latents to a geometry model, and distil it",
        description=(
            "Cache latents and the teacher's geometry, search the layer to stitch at, train connector and LoRA. The "
            "model is in OUTPUT/lgm; the same command goes on where it stopped. For several GPUs: "
            "torchrun --nproc-per-node N -m vggrpo.cli train-lgm CONFIG."
        ),
    )
    parser.add_argument("config", help="a YAML file, or the name of a shipped recipe such as lgm-tiny")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config fields to change, such as updates=20 clips.videos=videos output=runs/lgm",
    )
    parser.add_argument("--search-only", action="store_true", help="stop after the layer search")
    parser.set_defaults(run=run, resume=GO_ON)


def run(arguments: argparse.Namespace) -> None:
    """Load the config first (it imports no torch), then train."""
    from vggrpo.config_lgm import load_lgm_config

    config = load_lgm_config(arguments.config, arguments.overrides)
    from vggrpo.distributed import announced
    from vggrpo.pretraining.distill import train_lgm

    made = train_lgm(config, search_only=arguments.search_only)
    if announced(os.environ)[0] == 0:  # one of several processes speaks for all
        print(f"written: {made}")
