"""Adapters that give the model access to kho's memory."""

from __future__ import annotations

import kho

import model


class ArenaMemory(model.Memory):
    """An arena as memory of the model."""

    def __init__(self, arena: kho.Arena) -> None:
        super().__init__([])
        self.arena = arena

    def read(self, phys: int, size: int) -> bytes:
        return self.arena.read(phys, size)
