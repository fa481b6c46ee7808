"""Save and load pruned models through the stock `save_pretrained` and `from_pretrained`."""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRIGGER = "transformers.modeling_utils"


class _AfterModelingUtils(importlib.abc.MetaPathFinder):
    """Registers the loader once transformers has imported its modeling code.

    `import transformers` alone does not import torch; `import hfslim` must not do so either.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("hfslim.hub.format.reload")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Let the stock `from_pretrained` load pruned models, from now on, in this process."""
    if _TRIGGER in sys.modules:
        importlib.import_module("hfslim.hub.format.reload")
    elif not any(isinstance(finder, _AfterModelingUtils) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterModelingUtils())


__all__ = ["register"]
