"""`vggrpo reproduce`: the paper's tables and figures, on the embedded world or with any recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from vggrpo.commands.arguments import GO_ON, Subparsers, add_device, at_least, frame_rate, guidance_scale

NAMES = (
    "main", "main-seconds", "rewards", "geometry", "lgm", "generalisation", "guidance", "efficiency", "robustness",
    "stitch", "hacking",
)  # fmt: skip


def add_parser(subparsers: Subparsers) -> None:
    """Add `reproduce`."""
    parser = subparsers.add_parser(
        "reproduce",
        help="a table or figure of the paper: train, generate, evaluate, compare",
        description=(
            "Run the recipe of a table: train its arms, generate the same prompts and seeds with each, evaluate, and "
            "compare with the base model. Writes TABLE.json, TABLE.md and TABLE.png into OUTPUT. Trainings are shared "
            "by the tables of one OUTPUT. --plan says what is to do and about how long it takes on this machine."
        ),
    )
    parser.add_argument("table", choices=[*NAMES, "all"], help="which one")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"), help="directory (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: shows that it runs, and nothing else")
    parser.add_argument("--plan", action="store_true", help="run nothing: time a small trial, and say what each cell "
                        "would take")  # fmt: skip
    parser.add_argument("--config", default="tiny", help="recipe that the arms change (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="training runs an arm (default: %(default)s)")
    parser.add_argument("--prompts", type=at_least(2), default=48, help="at most, of each set (default: %(default)s)")
    parser.add_argument("--videos", type=at_least(1), default=2, help="a prompt and model (default: %(default)s)")
    parser.add_argument("--steps", type=at_least(2), default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=guidance_scale, help="classifier-free, 1 = none (default: that of the "
                        "recipe's roll-outs)")  # fmt: skip
    parser.add_argument("--updates", type=at_least(1), help="of GRPO; the rivals get as many videos (default: recipe)")
    parser.add_argument(
        "--lgm-config", default="lgm-tiny", help="recipe of the LGMs of table lgm (default: %(default)s)"
    )
    parser.add_argument("--far", type=at_least(2), help="updates of the hacking study (default: 5 times those of GRPO)")
    parser.add_argument("--marks", type=at_least(1), default=8, help="looks of the hacking study at the model "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these arms")
    parser.add_argument("--sets", nargs="+", default=[], metavar="SET", help="prompt sets (default: the table's)")
    parser.add_argument("--judge", metavar="DIR", help="directory or hub id of the geometry network that judges "
                        "(default: the embedded one, of videos of the embedded world only)")  # fmt: skip
    parser.add_argument("--metrics", default="fast", help="fast, all, or names joined by commas (default: %(default)s)")
    parser.add_argument("--fps", type=frame_rate, help="frames a second of the videos (default: dpo.fps of the recipe)")
    parser.add_argument("--batch", type=at_least(1), help="videos at once (default: 8, or sampling.micro_batch of the "
                        "recipe where that is less)")  # fmt: skip
    add_device(parser)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="config fields of all trainings")
    parser.set_defaults(run=run, resume=GO_ON)


def run(arguments: argparse.Namespace) -> None:
    """Run the recipes one after the other."""
    from vggrpo.reproduce import Settings, reproduce

    settings = Settings(
        config=arguments.config,
        lgm_config=arguments.lgm_config,
        far=arguments.far,
        marks=arguments.marks,
        seeds=arguments.seeds,
        prompts=arguments.prompts,
        videos=arguments.videos,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        updates=arguments.updates,
        device=arguments.device,
        overrides=tuple(arguments.set),
        sets=tuple(arguments.sets),
        judge=arguments.judge,
        metrics=arguments.metrics,
        fps=arguments.fps,
        batch=arguments.batch,
    )
    names = NAMES if arguments.table == "all" else (arguments.table,)
    settings = settings.smallest() if arguments.quick else settings
    if arguments.plan:
        from vggrpo.reproduce.plan import plan, plan_lines
        from vggrpo.reproduce.run import notes

        print("\n".join(plan_lines(*plan(names, arguments.output, settings, arguments.arms))))
        for line in notes(names, arguments.arms, settings):
            print(line)
        return
    written = reproduce(names, arguments.output, settings, arms=arguments.arms)
    print("results in " + ", ".join(str(path) for path in written))
