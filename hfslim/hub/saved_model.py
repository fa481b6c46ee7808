"""What a folder says of the model that was saved to it, and the ways to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hfslim.hub.edits import CardError

__all__ = ["Saved", "Way"]

TASKS = {
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "ForAudioClassification": ("audio-classification", "AutoModelForAudioClassification"),
}


class Way(NamedTuple):
    """One way of loading the model: what it needs, and the code."""

    when: str
    code: str


@dataclass(frozen=True)
class Saved:
    """What a folder says of the model that was saved to it.

    Attributes:
        config: Its `config.json`.
        task: transformers' name of the task; None if it is none of hfslim's.
        auto_class: The auto class that loads it.
    """

    config: dict[str, Any]
    task: str | None
    auto_class: str

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """Read the `config.json` of a folder.

        Raises:
            CardError: There is none that can be read.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            architecture = (config.get("architectures") or [""])[0]
        except FileNotFoundError:
            raise CardError(
                f"{folder} has no config.json: give the folder of a saved model"
            ) from None
        except (ValueError, AttributeError) as error:
            raise CardError(f"{path} is damaged: {error}") from error
        ending = next((end for end in TASKS if str(architecture).endswith(end)), None)
        task, auto_class = TASKS[ending] if ending else (None, "AutoModel")
        return cls(config, task, auto_class)

    @property
    def pruned(self) -> bool:
        """Whether its structure is one that a stock config cannot say."""
        return "hfslim" in self.config

    def ways(self, name: str) -> list[Way]:
        """Return the ways of loading that hold for it.

        Args:
            name: Hub id or folder to load.
        """
        if not self.pruned:
            return [Way("With transformers alone:", self._code(name))]
        ways = [Way("Where hfslim is installed:", self._code(name, first="import hfslim"))]
        if self.config.get("auto_map"):
            ways.append(
                Way(
                    "With transformers alone, by the small file `modeling_hfslim.py` beside the "
                    "weights, which builds the layers in their sizes:",
                    self._code(name, more=", trust_remote_code=True"),
                )
            )
        return ways

    def _code(self, name: str, first: str = "", more: str = "") -> str:
        names = f"{self.auto_class}, pipeline" if self.task else self.auto_class
        lines = [*([first] if first else []), f"from transformers import {names}", ""]
        lines.append(f'model = {self.auto_class}.from_pretrained("{name}"{more})')
        if self.task:
            lines.append(f'classify = pipeline("{self.task}", model="{name}"{more})')
        return "\n".join(lines)
