"""Section `checkpoint`: what is kept, and what happens when saving or loading goes wrong."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megacogvx.config import Section


class CheckpointConfig(Section):
    """What is kept of a run; when a checkpoint is written is `training.save_every`.

    Attributes:
        keep_last: complete checkpoints that stay, the newest; None keeps all.
        keep_every: a checkpoint whose step is a multiple of this stays for ever; None: none does.
        background: write while the training goes on; a step then waits for the copy of the states alone, which takes
            as much memory of the host as they do.
        failed_saves: how many saves in a row may fail (a full disk, say) before the run stops; the training goes on
            meanwhile and the last good checkpoint stays.
        on_damaged: what a resumed run does when its newest checkpoint is damaged: go back to the newest good one, or
            stop.
    """

    keep_last: int | None = Field(5, ge=1)
    keep_every: int | None = Field(None, ge=1)
    background: bool = True
    failed_saves: int = Field(2, ge=0)
    on_damaged: Literal["go_back", "stop"] = "go_back"
