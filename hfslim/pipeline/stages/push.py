"""The stage `push`: upload the model to the Hub."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from huggingface_hub.utils import validate_repo_id

from hfslim.hub.card import RECIPE
from hfslim.hub.push import push
from hfslim.pipeline.manifest import StageRecord
from hfslim.pipeline.run_report import current_report
from hfslim.pipeline.stages.base import Stage

if TYPE_CHECKING:
    from hfslim.pipeline.run_state import RunState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Push(Stage):
    """Upload the model, its processor, card, report and recipe to the Hub."""

    name = "push"
    makes_model = False
    uploads = True
    hub_model_id: str
    hub_private_repo: bool | None = None
    hub_revision: str | None = None

    def __post_init__(self) -> None:
        validate_repo_id(self.hub_model_id)

    def run(self, state: RunState, record: StageRecord, args: Any) -> None:
        """Write the files and upload them from the first process."""
        report = current_report(state)
        if not PartialState().is_main_process:
            return
        folder = state.folder_of(record)
        for part in (state.task.auto_model.from_pretrained(state.source), state.processor):
            part.save_pretrained(folder)
        report.write(folder)
        (folder / RECIPE).write_text(state.recipe.to_yaml(), encoding="utf-8")
        commit = push(
            folder, self.hub_model_id, private=self.hub_private_repo, revision=self.hub_revision
        )
        logger.info("pushed %s: %s", folder, commit.commit_url)
