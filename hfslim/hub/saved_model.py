"""The config of a saved model, and code that loads the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hfslim.hub.edits import CardError

__all__ = ["LoadingExample", "SavedModel"]

TASKS = {
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "ForAudioClassification": ("audio-classification", "AutoModelForAudioClassification"),
}


class LoadingExample(NamedTuple):
    """Code that loads the model, and when it works."""

    when: str
    code: str


@dataclass(frozen=True)
class SavedModel:
    """The config of a saved model, and the task and class that follow from it.

    Attributes:
        config: The content of `config.json`.
        task: transformers' name of the task; None if it is not one of hfslim's.
        auto_class: The auto class that loads the model.
    """

    config: dict[str, Any]
    task: str | None
    auto_class: str

    @classmethod
    def read(cls, folder: Path) -> SavedModel:
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
        """Whether the structure is one that a stock config cannot express."""
        return "hfslim" in self.config

    @property
    def remote(self) -> bool:
        """Whether the model's classes are code of its own repository."""
        classes = (self.config.get("auto_map") or {}).values()
        return any("modeling_hfslim." not in str(one) for one in classes)

    def loading_examples(self, name: str) -> list[LoadingExample]:
        """Return the code that loads this model from a Hub id or folder, in each way that works."""
        if not self.pruned:
            return [LoadingExample("With transformers alone:", self._code(name))]
        remote = ", trust_remote_code=True" if self.remote else ""
        code = self._code(name, first="import hfslim\n", more=remote)
        when = "With hfslim and the model's own code, which needs both:"
        when = when if remote else "Where hfslim is installed:"
        examples = [LoadingExample(when, code)]
        if self.config.get("auto_map") and not remote:
            when = (
                "With transformers alone, by the small file `modeling_hfslim.py` beside the "
                "weights, which builds the layers in their sizes:"
            )
            code = self._code(name, more=", trust_remote_code=True")
            examples.append(LoadingExample(when, code))
        return examples

    def _code(self, name: str, first: str = "", more: str = "") -> str:
        names = f"{self.auto_class}, pipeline" if self.task else self.auto_class
        code = f"""{first}from transformers import {names}

model = {self.auto_class}.from_pretrained("{name}"{more})"""
        if self.task:
            code += f'\nclassify = pipeline("{self.task}", model="{name}"{more})'
        return code
