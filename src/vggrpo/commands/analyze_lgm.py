"""`vggrpo analyze-lgm`: how accurate, how robust and how dear an LGM is."""

from __future__ import annotations

import argparse
from pathlib import Path

from vggrpo.commands.arguments import START_AGAIN, Subparsers, add_device, at_least, image_size


def add_parser(subparsers: Subparsers) -> None:
    """Add `analyze-lgm`."""
    parser = subparsers.add_parser(
        "analyze-lgm",
        help="accuracy, robustness to latent noise, and cost of an LGM",
        description=(
            "Compare an LGM with the RGB geometry model that it was made from: errors on held-out clips, errors "
            "against growing latent noise (decode-then-RGB beside it), and what both cost. `vggrpo audit-reward` asks "
            "whether its rewards are signal."
        ),
    )
    parser.add_argument("--lgm", default="embedded", help="directory of an LGM (default: %(default)s)")
    parser.add_argument(
        "--video-model", default="embedded",
        help="pipeline, or directory of an image autoencoder, whose latents it reads (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--geometry", help="the RGB model (default: the one that the LGM names)")
    parser.add_argument(
        "--videos", default="embedded",
        help="folder, manifest, .tar or video; embedded: rendered clips, with truth (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/analysis"), help="directory (default: %(default)s)")
    parser.add_argument("--clips", type=at_least(1), default=32, help="clips (default: %(default)s)")
    parser.add_argument("--frames", type=at_least(2), default=17, help="RGB frames a clip (default: %(default)s)")
    parser.add_argument("--size", type=image_size, default=(64, 64), help="HEIGHTxWIDTH of the clips (default: 64)")
    parser.add_argument(
        "--parts", default="accuracy,noise,cost",
        help="of accuracy, noise, cost, full-shape (FLOPs at Wan's shapes, no weights) (default: %(default)s)",
    )  # fmt: skip
    add_device(parser)
    parser.set_defaults(run=run, resume=START_AGAIN)


def run(arguments: argparse.Namespace) -> None:
    """Analyse; the function prints its tables and writes them."""
    from vggrpo.evaluation.lgm_analysis import analyze_lgm

    analyze_lgm(
        arguments.lgm,
        arguments.output,
        video_model=arguments.video_model,
        geometry=arguments.geometry,
        videos=arguments.videos,
        clips=arguments.clips,
        num_frames=arguments.frames,
        size=arguments.size,
        parts=[part.strip() for part in arguments.parts.split(",") if part.strip()],
        device=arguments.device,
    )
