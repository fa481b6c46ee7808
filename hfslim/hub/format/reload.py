"""Let the stock `from_pretrained` and `save_pretrained` handle pruned models.

Importing this module registers a loader for checkpoints whose config names the method `hfslim`.
transformers calls it like a quantizer, on the meta model before the weights load. The loaded model
is of the stock class and is not marked as quantized.
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfslim.hub.format import modeling_hfslim

FILE = "modeling_hfslim.py"


@register_quantization_config("hfslim")
class BlueprintConfig(QuantizationConfigMixin):
    """The `quantization_config` of a pruned checkpoint; the blueprint itself is `config.hfslim`."""

    def __init__(self, quant_method: str = "hfslim", **_: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of `config.json`."""
        return {"quant_method": "hfslim"}

    to_diff_dict = to_dict


@register_quantizer("hfslim")
class BlueprintLoader(HfQuantizer):
    """Cuts the meta model to the shapes of the checkpoint; nothing is quantized."""

    def validate_environment(self, *_: Any, weights_only: bool = True, **__: Any) -> None:
        """Refuse to unpickle files."""
        if not weights_only:
            raise modeling_hfslim.BlueprintError(f"weights_only=False: {modeling_hfslim.ONLY}")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        modeling_hfslim.check_weights(str(model.config.name_or_path), checkpoint_files or ())
        if not getattr(model, "hfslim_applied", False):
            modeling_hfslim.apply_blueprint(model, getattr(model.config, "hfslim", None))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            vars(model).pop(name, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        model.config.quantization_config = {"quant_method": "hfslim"}

    def is_serializable(self) -> bool:
        """Return True: a loaded model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether a loaded model can be trained."""
        return True


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Save as ever; beside a pruned model, save the file that rebuilds it without hfslim."""
    if not getattr(model.config, "hfslim", None):
        _STOCK_SAVE(model, save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        return
    # This module is imported while transformers is; anatomy needs the whole of it.
    from hfslim.hub.format import blueprint

    shared = model.config
    model.config = config = blueprint.own_config(model)
    try:
        _STOCK_SAVE(model, save_directory, is_main_process, state_dict, **kwargs)
    finally:
        model.config = shared
    folder = Path(save_directory)
    if is_main_process and getattr(config, "hfslim", None):
        shutil.copyfile(modeling_hfslim.__file__, folder / FILE)
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            # The stock Trainer pushes a checkpoint from the folder above, and copies only the
            # weights and the config there.
            shutil.copyfile(modeling_hfslim.__file__, folder.parent / FILE)
    if push_to_hub:
        names = ("commit_message", "private", "token", "create_pr", "revision", "max_shard_size")
        repo_id = kwargs.get("repo_id", folder.name)
        model.push_to_hub(repo_id, **{n: kwargs[n] for n in names if n in kwargs})


def _push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    token: bool | str | None = None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
    **where: Any,
) -> Any:
    """Push as ever; a pruned model in one commit, with the card of hfslim."""
    if not getattr(model.config, "hfslim", None):
        own = {"commit_message": commit_message, "token": token, "tags": tags}
        return _STOCK_PUSH(model, repo_id, max_shard_size=max_shard_size, **own, **where)
    # Loading and saving need neither.
    from hfslim.hub.card import write_card
    from hfslim.hub.push import push

    names = [tags] if isinstance(tags, str) else list(tags or [])
    names += [tag for tag in model.model_tags or [] if tag not in names]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        write_card(folder, name=repo_id, metadata={"tags": names} if names else {})
        return push(
            folder,
            repo_id,
            token=token if isinstance(token, str) else None,
            commit_message=commit_message or "Upload model",
            **where,
        )


def _from_config(cls: type[PreTrainedModel], config: PreTrainedConfig, **kwargs: Any) -> Any:
    """Build as ever; the config of a pruned model builds one of its shape."""
    model = _STOCK_FROM_CONFIG(cls, config, **kwargs)
    marks = getattr(model.config, "hfslim", None)
    if marks and not getattr(model, "hfslim_applied", False) and not _is_inside_another():
        modeling_hfslim.apply_blueprint(model, marks)
    return model


def _is_inside_another() -> bool:
    """Return whether a model is being built as a part of another one, which is cut as a whole."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(owner, PreTrainedModel):
            return True
        frame = frame.f_back
    return False


# On the class: methods of each model's own would lead copies to the original, and keep a model that
# is deleted in memory until the next garbage collection.
_STOCK_SAVE, _STOCK_PUSH = PreTrainedModel.save_pretrained, PreTrainedModel.push_to_hub
_STOCK_FROM_CONFIG = PreTrainedModel._from_config.__func__  # type: ignore[attr-defined]
PreTrainedModel.save_pretrained = functools.wraps(_STOCK_SAVE)(_save_pretrained)  # type: ignore
PreTrainedModel.push_to_hub = functools.wraps(_STOCK_PUSH)(_push_to_hub)  # type: ignore
PreTrainedModel._from_config = classmethod(functools.wraps(_STOCK_FROM_CONFIG)(_from_config))  # type: ignore
