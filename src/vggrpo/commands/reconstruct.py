"""`vggrpo reconstruct`: the 4D geometry of one video."""

from __future__ import annotations

import argparse
from pathlib import Path

from vggrpo.commands.arguments import START_AGAIN, Subparsers, add_device, at_least

EMBEDDED_SIDE, LONG_SIDE = 64, 592  # what they were trained at; 592 is 37 patches of 16, or 518 pixels in patches of 14


def add_parser(subparsers: Subparsers) -> None:
    """Add `reconstruct`."""
    parser = subparsers.add_parser(
        "reconstruct",
        help="the 4D geometry of one video: cameras, depth, points, masks, a page to look at",
        description=(
            "Predict the geometry of one video, of any size, length and frame rate, and write cameras (TUM, COLMAP), "
            "depth (16-bit PNG, NPZ), points (PLY), masks of what moves, and index.html with the scene in 3D. The "
            "embedded networks know the embedded world only; for real video name the weights of a real model."
        ),
    )
    parser.add_argument("video", type=Path, help="a video file")
    parser.add_argument("--output", type=Path, required=True, help="directory of the result")
    parser.add_argument(
        "--model", default="embedded", help="directory or hub id of a geometry model (default: %(default)s)"
    )
    parser.add_argument("--lgm", help='read the latents instead, with the LGM in this directory (or "embedded")')
    parser.add_argument("--pipeline", default="embedded", help="whose VAE makes the latents (default: %(default)s)")
    parser.add_argument("--views", type=at_least(2), default=16, help="at most, over the whole video (default: 16)")
    parser.add_argument(
        "--long-side", type=at_least(16), metavar="PIXELS",
        help=f"a larger video is scaled down to it (default: {LONG_SIDE}; {EMBEDDED_SIDE} for the embedded models)",
    )  # fmt: skip
    add_device(parser)
    parser.add_argument("--view", action="store_true", help="then show it live in the browser (needs vggrpo[view])")
    parser.add_argument("--port", type=at_least(1, most=65535), default=8080, help="of --view (default: %(default)s)")
    parser.set_defaults(run=run, resume=START_AGAIN)


def run(arguments: argparse.Namespace) -> None:
    """Reconstruct, say at which size and which frames, and show it if asked."""
    from vggrpo.evaluation.live_view import require_viser, serve
    from vggrpo.evaluation.reconstruct import reconstruct_video

    if arguments.view:
        require_viser()
    reader = arguments.lgm or arguments.model
    found = reconstruct_video(
        arguments.video,
        arguments.output,
        model=arguments.model,
        lgm=arguments.lgm,
        pipeline=arguments.pipeline,
        views=arguments.views,
        long_side=arguments.long_side or (EMBEDDED_SIDE if reader == "embedded" else LONG_SIDE),
        device=arguments.device,
    )
    clip, (height, width) = found.clip, found.prediction.size
    print(
        f"{clip.source_frames} frames of {clip.source_size[1]}x{clip.source_size[0]} pixels, seen as {len(clip.index)} "
        f"views of {width}x{height} (frames {clip.index[0]}, {clip.index[1]}, ... {clip.index[-1]}) by {found.by}"
    )
    print(f"{len(found.cloud.points)} points, {int(found.cloud.moving.sum())} of them move; open {found.page}")
    if arguments.view:
        serve(found, arguments.port)
