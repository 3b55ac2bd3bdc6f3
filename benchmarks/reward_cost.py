"""Time, peak memory and FLOPs of a reward at full shape: through RGB, and through an LGM of either view rate.

    python benchmarks/reward_cost.py [--model wan2.1|wan2.2] [--layer 0] [--paths rgb lgm_latent] [--flops-only]
    python benchmarks/reward_cost.py --device cpu --clip 17 240 416 --paths rgb lgm_latent rewards --repeats 1

Weights are random: a cost does not depend on them. On a GPU VAE and Any4D run in bfloat16 under autocast for all paths,
which favours the RGB path. Without a CUDA device only the operations are counted, unless `--device cpu` asks for more:
minutes for a clip that `--clip` makes short and small.
"""

from __future__ import annotations

import argparse
import json

import torch

from vggrpo.evaluation.lgm_cost import WAN_2_1, WAN_2_2, cost_table, full_shape, reward_paths
from vggrpo.models.any4d import Any4D, Any4DConfig


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("wan2.1", "wan2.2"), default="wan2.1", help="default: %(default)s")
    parser.add_argument("--layer", type=int, default=0, help="stitch point (default: %(default)s)")
    parser.add_argument("--clip", nargs=3, type=int, metavar=("FRAMES", "HEIGHT", "WIDTH"), help="default: the model's")
    parser.add_argument("--device", choices=("cuda", "cpu", "meta"), help="default: cuda if there is one, else meta")
    parser.add_argument("--flops-only", action="store_true", help="count, measure nothing")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls after a warm-up (default: %(default)s)")
    parser.add_argument("--paths", nargs="+", metavar="PATH", help="some of the paths, rgb first (default: all)")
    arguments = parser.parse_args()
    wanted = arguments.device or ("cuda" if torch.cuda.is_available() else "meta")
    device = torch.device("meta" if arguments.flops_only else wanted)
    model = WAN_2_1 if arguments.model == "wan2.1" else WAN_2_2
    model = model | {"clip": tuple(arguments.clip or model["clip"])}
    torch.manual_seed(0)
    paths = reward_paths(*full_shape(model, lambda: Any4D(Any4DConfig()), device, arguments.layer))
    paths = {name: paths[name] for name in arguments.paths or paths}
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        table = cost_table(paths, device, arguments.repeats)
    names = {"cuda": torch.cuda.get_device_name, "cpu": lambda: f"CPU, {torch.get_num_threads()} threads"}
    name = names.get(device.type, lambda: "none: operations only")()
    print(
        json.dumps(
            {"model": model["name"], "clip": model["clip"], "layer": arguments.layer, "device": name, "paths": table},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
