"""Commands of two words beside one that takes free words: `qzoom eval zoomgap` next to `qzoom eval TASK...`."""

from __future__ import annotations

from typing import Any

import typer.core

__all__ = ["TwoWords"]


class TwoWords(typer.core.TyperGroup):
    """A group that finds a command by its first two words before it looks for one by its first word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """See `TyperGroup.resolve_command`."""
        both = " ".join(args[:2])
        if len(args) > 1 and both in self.commands:
            return both, self.commands[both], args[2:]
        return super().resolve_command(ctx, args)
