"""The paper's tables and figures, one recipe each: train, generate, evaluate and compare, as the commands do."""

from __future__ import annotations

from vggrpo.reproduce.recipes import STUDIES, TABLES, Arm, Table
from vggrpo.reproduce.run import reproduce
from vggrpo.reproduce.settings import Settings

__all__ = ["STUDIES", "TABLES", "Arm", "Settings", "Table", "reproduce"]
