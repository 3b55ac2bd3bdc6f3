"""One module a command: `add_parser` describes its arguments, `run` calls the library. No module here imports torch."""

from __future__ import annotations

from vggrpo.commands import (
    analyze_lgm,
    audit_reward,
    benchmark,
    compare,
    demo,
    doctor,
    evaluate,
    generate,
    reconstruct,
    reproduce,
    train,
    train_lgm,
    world,
)

COMMANDS = (
    demo,
    train,
    train_lgm,
    analyze_lgm,
    audit_reward,
    generate,
    evaluate,
    compare,
    benchmark,
    reconstruct,
    reproduce,
    world,
    doctor,
)
