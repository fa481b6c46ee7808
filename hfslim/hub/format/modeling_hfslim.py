"""Rebuild a model pruned with hfslim, before its weights load.

This one file is all that a pruned checkpoint needs: it travels beside the weights and is used by
`from_pretrained(..., trust_remote_code=True)` where hfslim is not installed, and by hfslim itself
where it is. `config.hfslim`, the blueprint, says how the pruned model differs from the stock model
that the rest of the config describes:

    {"version": 1,
     "layers": {list path: [positions kept]},
     "replaced": {attention path: {"by": class below, its settings ...}},
     "attributes": {module path: {name: value}},
     "shapes": {parameter path: [sizes]}}

A blueprint is data from outside: every path, name and size is checked, and only sizes go down.
"""

import copy
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

VERSION = 1
ONLY = "the weights of a pruned model are read from safetensors only"
MAX_COUNT = 1 << 16
"""Bound on heads, neurons and whatever else is counted by a setting."""


class BlueprintError(ValueError):
    """`config.hfslim` does not describe a pruned version of the model that it came with."""


class Headless(nn.Module):
    """An attention module that has lost every head: only its output projection's bias is left.

    Attributes:
        output: Name of the output projection inside the module; empty if it lies outside, or, where
            there is a residual, if it is no module and has no bias.
        returns: Length of the tuple that the stock class returns; 0 for a bare tensor.
        residual: Name of the argument that the stock class adds to its output, if any.
        norm: Name of the norm after that, if any.
        listed: Whether the stock class returns a list.
    """

    output = ""
    returns = 2
    residual = ""
    norm = ""
    listed = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the stock class would, without any head."""
        hidden = (
            kwargs["hidden_states"] if "hidden_states" in kwargs else (*args, *kwargs.values())[0]
        )
        # MPNet's tuple is longer by the weights where they are asked for.
        weights = [None] if self.returns and kwargs.get("output_attentions") else []
        if self.residual:
            result, *others = self.without_heads(hidden, *weights)
            result = result + self._bound(*args, **kwargs)[self.residual]
            return (getattr(self, self.norm)(result) if self.norm else result, *others)
        return self.without_heads(hidden, *weights)

    def _bound(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of the stock class's forward by name."""
        stock: Any = stock_class(self)
        call = inspect.signature(stock.forward).bind(self, *args, **kwargs)
        rest = call.arguments.pop("kwargs", {})
        return {**call.arguments, **rest}

    def without_heads(self, hidden: torch.Tensor, *others: Any) -> Any:
        """Return the output of no heads, and the rest of the stock class's tuple."""
        result = hidden[..., :0]
        if self.output:
            result = getattr(self, self.output)(result)
        elif self.residual:
            result = torch.zeros_like(hidden)
        if torch.is_grad_enabled():
            # Every parameter takes part, or DistributedDataParallel would wait for its gradient.
            result = result + 0 * sum(p.sum() for p in self.parameters())
        if not self.returns:
            return result
        whole = (result, *others, *[None] * (self.returns - 1 - len(others)))
        return list(whole) if self.listed else whole


BIASES = {"alibi", "attention_mask", "position_bias", "rel_pos", "rel_2d_pos"}
"""Arguments that may hold a bias for all heads."""


class BiasedHeads(Headless):
    """Attention whose caller adds a bias for all heads: takes the rows of those that are left.

    Attributes:
        kept_heads: Positions of the present heads among the bias's; None where none is missing.
        bias_heads: Number of heads of the bias.
    """

    kept_heads: tuple[int, ...] | None = None
    bias_heads = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock forward on the bias of the kept heads."""
        if self.kept_heads is None:
            return super(Headless, self).forward(*args, **kwargs)
        if not self.kept_heads:
            return super().forward(*args, **kwargs)
        arguments = self._bound(*args, **kwargs)
        for name in BIASES & set(arguments):
            arguments[name] = self._select(arguments[name])
        del arguments["self"]
        return super(Headless, self).forward(**arguments)

    def _select(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Take the kept heads of `[batch, heads, ...]` or `[batch · heads, ...]`."""
        kept = list(self.kept_heads or ())
        if bias is not None and bias.ndim == 4 and bias.shape[1] == self.bias_heads > 1:
            return bias[:, kept]
        if bias is not None and bias.ndim == 3:
            return bias.unflatten(0, (-1, self.bias_heads))[:, kept].flatten(0, 1)
        return bias


class SharedBiasHeads(BiasedHeads):
    """T5's attention: the first layer's position bias, of all heads, goes on to the others."""

    layer_idx: int
    has_relative_attention_bias: bool
    compute_bias: Callable[..., torch.Tensor]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the stock forward on the bias of the kept heads, and pass on that of all."""
        if self.kept_heads is None:
            return super(Headless, self).forward(hidden_states, *args, **kwargs)
        arguments = self._bound(hidden_states, *args, **kwargs)
        bias = arguments.get("position_bias")
        if bias is None:
            bias = self._bias(arguments)
        if not self.kept_heads:
            return self.without_heads(hidden_states, bias)
        del arguments["self"]
        arguments["position_bias"] = self._select(bias)
        result, _, *rest = super(Headless, self).forward(**arguments)
        return (result, bias, *rest)

    def _bias(self, arguments: dict[str, Any]) -> torch.Tensor:
        hidden, others = arguments["hidden_states"], arguments.get("key_value_states")
        cache = arguments.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        keys = hidden.shape[1] + past if others is None else others.shape[1]
        if self.has_relative_attention_bias:
            return self.compute_bias(
                hidden.shape[1], keys, device=hidden.device, past_seen_tokens=past
            )
        return hidden.new_zeros(1, self.bias_heads, hidden.shape[1], keys)


class CountedHeads(Headless):
    """Attention that reads the number of its heads in the model's config, where all have as many.

    Attributes:
        count_field: Name of the field.
        head_count: What this module is to read there; None where none is missing.
    """

    count_field = ""
    head_count: int | None = None

    @property
    def config(self) -> Any:
        """The model's config, with this module's number of heads."""
        config = vars(self)["config"]
        if self.head_count is not None:
            config = copy.copy(config)
            vars(config)[config.attribute_map.get(self.count_field, self.count_field)] = (
                self.head_count
            )
        return config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock forward, unless no head is left."""
        if self.head_count == 0:
            return super().forward(*args, **kwargs)
        return super(Headless, self).forward(*args, **kwargs)


class Inputless(nn.Module):
    """A `Conv1D` that has lost every input: only its bias is left."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the bias at every position."""
        weight, bias = self.get_parameter("weight"), self.get_parameter("bias")
        # Parameters and inputs take part, so that their gradients are zero, not missing.
        return (bias + weight.sum() + inputs.sum()).expand(*inputs.shape[:-1], -1)


class WavLMHeads(Headless):
    """WavLM's attention through its own projection modules, with any set of heads.

    The stock class hands raw weights to torch's multi-head attention. The gate of the relative
    position bias reads slice `h` of the hidden states for head `h` (arXiv 2110.13900, section
    3.1), so the heads keep their original numbers.

    Attributes:
        kept_heads: Original numbers of the present heads; None where none is missing.
    """

    kept_heads: tuple[int, ...] | None = None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    head_dim: int
    dropout: float
    gru_rel_pos_linear: nn.Linear
    gru_rel_pos_const: torch.Tensor
    compute_bias: Callable[[int, int], torch.Tensor]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the output, no attention weights, and the position bias of all heads."""
        batch, length, _ = hidden_states.shape
        all_heads = self.gru_rel_pos_const.shape[1]
        if position_bias is None:
            position_bias = self.compute_bias(length, length)
            position_bias = position_bias.repeat(batch, 1, 1)
        numbers = tuple(range(all_heads)) if self.kept_heads is None else self.kept_heads
        if not numbers:
            return self.without_heads(hidden_states, None, position_bias)
        kept = torch.as_tensor(numbers, device=hidden_states.device)
        by_head = hidden_states.view(batch, length, all_heads, -1).transpose(1, 2)[:, kept]
        gates = self.gru_rel_pos_linear(by_head).view(*by_head.shape[:-1], 2, 4).sum(-1)
        gate_a, gate_b = torch.sigmoid(gates).chunk(2, dim=-1)
        gate = gate_a * (gate_b * self.gru_rel_pos_const[:, kept] - 1.0) + 2.0
        bias = gate * position_bias.view(batch, all_heads, length, length)[:, kept]
        if attention_mask is not None:
            hidden = attention_mask.ne(1)[:, None, None, :]
            bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        query, key, value = (
            project(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        result = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0
        )
        result = self.out_proj(result.transpose(1, 2).reshape(batch, length, -1))
        return result, None, position_bias


class AcrossHeads(nn.Module):
    """A norm of queries or keys that runs across all heads, of which only some go on.

    Attributes:
        kept_heads: Positions of those that go on, or of their groups.
        head_count: How many there are.
    """

    kept_heads: tuple[int, ...] = ()
    head_count = 1

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise all, and return what is left, `[..., features]`."""
        by_head = super().forward(hidden_states).unflatten(-1, (self.head_count, -1))
        return by_head[..., list(self.kept_heads), :].flatten(-2)


REPLACEMENTS = {
    cls.__name__: cls
    for cls in (
        *(Headless, BiasedHeads, SharedBiasHeads, CountedHeads, WavLMHeads, AcrossHeads, Inputless),
    )
}
FORMER_REPLACEMENTS = ("ConvBertHeads", "DogeHeads", "LongformerHeads", "PvtV2Heads")
"""Classes that only hfslim 0.1.0 had; the file saved beside such a checkpoint has them."""


def stock_class(module: nn.Module) -> type:
    """Return a module's own class, where one of this file or of torch's has taken its place."""
    own = [c for c in type(module).__mro__ if not c.__module__.endswith("modeling_hfslim")]
    return next((c for c in own if not c.__module__.startswith("torch.")), own[0])


def replace_class(module: nn.Module, by: str, **settings: Any) -> None:
    """Make a stock module an instance of one of the classes above, in place."""
    stock = stock_class(module)
    # Pickle takes dots in a class's name for nested classes.
    path = stock.__module__.replace(".", ":")
    module.__class__ = getattr(_this_module(), f"{by}__{path}__{stock.__name__}")
    for name, value in settings.items():
        setattr(module, name, tuple(value) if isinstance(value, list) else value)


def apply_blueprint(model: nn.Module, blueprint: Any) -> None:
    """Give a stock model, on any device, the shapes of the pruned one; contents are not set.

    Raises:
        BlueprintError: The blueprint does not fit the model. The model may be half changed.
    """
    _check_form(blueprint)
    for path, kept in blueprint.get("layers", {}).items():
        layers = _find(model, path)
        if (
            not isinstance(layers, nn.ModuleList | nn.Sequential)
            or not _ascending(kept, len(layers))
            or not kept
        ):
            raise BlueprintError(f"layers {kept} are not among those of {path!r}")
        keep_layers(layers, kept)
    for path, settings in blueprint.get("replaced", {}).items():
        _replace(_find(model, path), path, dict(settings))
    for path, values in blueprint.get("attributes", {}).items():
        module = _find(model, path)
        for name, value in values.items():
            _set_attribute(module, path, name, value)
    for path, shape in blueprint.get("shapes", {}).items():
        owner, _, name = path.rpartition(".")
        module = _find(model, owner)
        stock = module._parameters.get(name, module._buffers.get(name))
        if stock is None or not _smaller(shape, stock.shape):
            had = None if stock is None else list(stock.shape)
            raise BlueprintError(
                f"{path!r} cannot get the shape {shape}: the stock model has {had}"
            )
        new = torch.empty(shape, dtype=stock.dtype, device=stock.device)
        if name in module._buffers:
            module._buffers[name] = new
        else:
            module._parameters[name] = nn.Parameter(new, requires_grad=stock.requires_grad)


LAYER_NUMBERS = ("layer_idx", "layer_id", "seed")
"""Attributes in which modules keep the number of their layer."""


def keep_layers(layers: nn.ModuleList | nn.Sequential, kept: Sequence[int]) -> None:
    """Drop all but some layers, and renumber those that know their number."""
    chosen = [layers[i] for i in kept]
    del layers[:]
    layers.extend(chosen)
    for new, (old, layer) in enumerate(zip(kept, layers, strict=True)):
        for module in layer.modules():
            for name in LAYER_NUMBERS:
                if vars(module).get(name) == old:
                    vars(module)[name] = new


def tell_sizes(module: nn.Module, groups_stay: bool = False) -> None:
    """Bring the sizes that a linear map tells of itself up to date with its weight.

    Args:
        module: The map.
        groups_stay: Whether a convolution has lost channels of each group, not groups.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, Conv1D) and weight is not None:
        module.nx, module.nf = weight.shape
    elif weight is not None and weight.ndim == 2 and hasattr(module, "in_features"):
        vars(module).update(out_features=weight.shape[0], in_features=weight.shape[1])
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.num_features = module.weight.shape[0]
    elif isinstance(module, nn.GroupNorm):
        # Of the groups that channels may leave each has one.
        module.num_channels = module.num_groups = module.weight.shape[0]
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        per_group = module.out_channels // module.groups
        outputs, inputs = module.weight.shape[:2]
        if module.groups > 1 and not groups_stay:
            module.groups = outputs // per_group
        module.out_channels, module.in_channels = outputs, inputs * module.groups


def _check_form(blueprint: Any) -> None:
    parts = {"layers": list, "replaced": dict, "attributes": dict, "shapes": list}
    if not isinstance(blueprint, dict) or blueprint.get("version") != VERSION:
        found = blueprint.get("version") if isinstance(blueprint, dict) else blueprint
        newer = "update hfslim, or load the folder with the modeling_hfslim.py saved beside it"
        raise BlueprintError(
            f"config.hfslim has version {found!r}, expected {VERSION}: "
            + (newer if type(found) is int else "config.json is damaged, restore it or save again")
        )
    unknown = sorted(set(blueprint) - {"version", *parts})
    if unknown:
        raise BlueprintError(f"config.hfslim has unknown parts {unknown}, expected {list(parts)}")
    for part, form in parts.items():
        entries = blueprint.get(part, {})
        if not isinstance(entries, dict) or not all(isinstance(v, form) for v in entries.values()):
            raise BlueprintError(f"config.hfslim[{part!r}] must map paths to {form.__name__}s")


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        message = f"config.hfslim names {path!r}, which {stock_class(model).__name__} lacks"
        raise BlueprintError(message) from None


def _replace(module: nn.Module, path: str, settings: dict) -> None:
    by = settings.pop("by", None)
    allowed = {
        **dict.fromkeys(("output", "residual", "norm", "count_field"), str),
        **dict.fromkeys(("returns", "bias_heads", "head_count"), int),
        **{"kept_heads": list, "listed": bool},
    }
    for name, value in settings.items():
        # An exact type, because True is an int; a bound, because results get this long.
        fits = type(value) is allowed.get(name)
        if not fits or (isinstance(value, int) and not 0 <= value <= MAX_COUNT):
            raise BlueprintError(f"{path!r} cannot be replaced with {name}={value!r}")
    if by in FORMER_REPLACEMENTS:
        raise BlueprintError(
            f"{path!r} is replaced by {by!r}, which hfslim 0.1.0 was the last to have: load the "
            "checkpoint with that version, or pass trust_remote_code=True, which uses the "
            "modeling_hfslim.py saved beside the weights"
        )
    if not isinstance(by, str) or by not in REPLACEMENTS:
        raise BlueprintError(
            f"{path!r} is replaced by {by!r}, expected one of {sorted(REPLACEMENTS)}"
        )
    for name in (settings.get("output"), settings.get("norm")):
        if name and name not in module._modules:
            raise BlueprintError(f"{path!r} has no module {name!r}")
    if not _ascending(settings.get("kept_heads", []), MAX_COUNT):
        raise BlueprintError(f"{path!r} keeps heads {settings['kept_heads']}")
    replace_class(module, by, **settings)


def _set_attribute(module: nn.Module, path: str, name: str, value: object) -> None:
    value = tuple(value) if isinstance(value, list) else value
    known = name in vars(module) and not name.startswith("_")
    old: Any = vars(module).get(name)
    if not known or type(value) is not type(old) or not isinstance(value, int | float | tuple):
        raise BlueprintError(f"{path!r} has no setting {name!r} that could become {value!r}")
    if not no_larger(value, old):
        raise BlueprintError(f"{path}.{name} cannot become {value}: the stock model has {old}")
    setattr(module, name, value)


def no_larger(new: Any, old: Any) -> bool:
    """Tell whether a setting, or each of a tuple, is a count that did not grow, or a number."""
    if isinstance(old, tuple):
        return len(new) == len(old) and all(
            type(a) is type(b) and isinstance(a, int) and no_larger(a, b)
            for a, b in zip(new, old, strict=True)
        )
    return math.isfinite(new) if isinstance(old, float) else 0 <= new <= max(old, 0)


def _ascending(kept: list, total: int) -> bool:
    whole = all(type(i) is int and 0 <= i < total for i in kept)
    return whole and list(kept) == sorted(set(kept))


def _smaller(shape: list, stock: torch.Size) -> bool:
    return len(shape) == len(stock) and all(
        type(new) is int and 0 <= new <= old for new, old in zip(shape, stock, strict=True)
    )


def check_weights(source: str | Path, files: Sequence[str] = ()) -> None:
    """Refuse pickled weights, and weight files outside the folder, before any is read.

    Args:
        source: Folder of the checkpoint, or a Hub id, whose files are the Hub client's to find.
        files: The weight files that were found.

    Raises:
        BlueprintError: A file is none of safetensors, or lies outside the folder.
    """
    # Links are not followed: the Hub client's cache consists of them.
    folder, named = Path(os.path.normpath(Path(source).absolute())), [Path(file) for file in files]
    for index in folder.glob("*.safetensors.index.json"):
        shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        named += [folder / str(name) for name in shards.values()]
    for file in named:
        if file.suffix != ".safetensors":
            raise BlueprintError(f"{file}: {ONLY}")
        inside = Path(os.path.normpath(file.absolute())).is_relative_to(folder)
        if not (inside if folder.is_dir() else ".." not in file.parts):
            raise BlueprintError(f"{file}: this weight file lies outside {source}")


class Slim:
    """Mixed into a stock model class: builds the pruned model from the config alone."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        apply_blueprint(self, getattr(config, "hfslim", None))  # type: ignore[arg-type]
        self.hfslim_applied = True

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load as the stock class does; the call of hfslim's own loader is not needed here."""
        call = None
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise BlueprintError(f"use_safetensors={kwargs['use_safetensors']}: {ONLY}")
        source = str(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        check_weights(Path(source, kwargs.get("subfolder") or ""))
        if getattr(config, "hfslim", None):
            config = copy.deepcopy(config)
            call = vars(config).pop("quantization_config", None)
        result = super().from_pretrained(*args, config=config, **kwargs)  # type: ignore[misc]
        model = result[0] if isinstance(result, tuple) else result
        if call is not None:
            model.config.quantization_config = call
        return result

    @classmethod
    def is_custom_code(cls) -> bool:
        """Let the checkpoint's keys be read like those of the stock class."""
        return False


def _module(path: str) -> ModuleType:
    return importlib.import_module(path.replace(":", "."))


def _this_module() -> ModuleType:
    return importlib.import_module(__name__)


def _is_model(stock: Any) -> bool:
    return isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)


def __getattr__(name: str) -> type:
    """Build `Slim<StockModel>` and `<Replacement>__<module>__<StockAttention>` when asked for."""
    by, _, rest = name.partition("__")
    bases: tuple[type, type]
    if by in REPLACEMENTS and "__" in rest:
        module, _, stock_name = rest.rpartition("__")
        bases = (REPLACEMENTS[by], getattr(_module(module), stock_name))
    elif name.startswith("Slim") and _is_model(getattr(transformers, name[4:], None)):
        bases = (Slim, getattr(transformers, name[4:]))
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    cls = type(name, bases, {"__module__": __name__, "__doc__": bases[0].__doc__})
    globals()[name] = cls
    return cls
