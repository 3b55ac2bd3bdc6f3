"""Clips per second of the embedded world's ray caster, and what that is in VAE encodings of the same clips.

    python benchmarks/render.py [--size 64] [--clips 32] [--device cpu]

A single number of clips per second depends on the machine; the ratio, taken in the same run, does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from vggrpo import assets
from vggrpo.models.wan import WanVideoModel
from vggrpo.world import sample_batch


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Median time of `work` after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


@torch.inference_mode()
def main() -> None:
    """Time both and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=16, help="clips a batch (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    arguments = parser.parse_args()
    device, size = torch.device(arguments.device), (arguments.size, arguments.size)
    video = sample_batch(range(arguments.clips), size=size, device=device).video
    render = seconds(lambda: sample_batch(range(arguments.clips), size=size, device=device), device)
    model = WanVideoModel.from_pretrained(assets.path("pipeline"), device=device)
    encode = seconds(lambda: model.encode_video(video), device)
    row = {
        "clips_per_second": round(arguments.clips / render, 1),
        "rays_per_second": round(arguments.clips * 17 * arguments.size**2 * 5 / render),  # 4 colour, 1 depth
        "encode_time_over_render_time": round(encode / render, 2),
        "size": arguments.size, "clips": arguments.clips, "threads": torch.get_num_threads(), "device": str(device),
    }  # fmt: skip
    print(json.dumps(row))


if __name__ == "__main__":
    main()
