"""Rebuild a model pruned with hfslim, before its weights load.

A pruned checkpoint needs this one file. It lies beside the weights, and `from_pretrained` with
`trust_remote_code=True` uses it where hfslim is not installed; hfslim uses its own copy. With
neither, transformers stops at weights of other sizes; `ignore_mismatched_sizes` would draw the cut
layers at random. A model whose class is remote code itself needs hfslim and `trust_remote_code`.
`config.hfslim`, the blueprint, lists the differences between the pruned model and the stock model
that the rest of the config describes:

    {"version": 1,
     "layers": {list path: [positions kept]},
     "replaced": {attention path: {"by": class below, its settings ...}},
     "attributes": {module path: {name: value}},
     "shapes": {parameter path: [sizes]},
     "digest": hash of the parts above; none in checkpoints of hfslim 0.1.0}

A blueprint is data from outside: every path, name and size is checked, and sizes can only fall.
"""

import copy
import hashlib
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import conversion_mapping
from transformers.pytorch_utils import Conv1D

VERSION = 1
PARTS = {"layers": list, "replaced": dict, "attributes": dict, "shapes": list}
"""Parts of a blueprint, with the form of the value at each path."""
ONLY = "the weights of a pruned model are read from safetensors only"
MAX_COUNT = 1 << 16
"""Bound on every number among the settings of a replacement."""


class BlueprintError(ValueError):
    """`config.hfslim` does not describe a pruned version of the model that it came with."""


class Headless(nn.Module):
    """An attention module without heads: it returns the bias of its output projection.

    Attributes:
        output: Name of the output projection inside the module; empty if it lies outside, or, with
            a residual, if it is no module and has no bias.
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
        """Return the output of the stock class without any head."""
        hidden = kwargs.get("hidden_states", (*args, *kwargs.values())[0])
        # MPNet's tuple holds the weights too where they are asked for.
        weights = [None] if self.returns and kwargs.get("output_attentions") else []
        if self.residual:
            result, *others = self.without_heads(hidden, *weights)
            result = result + self.by_name(*args, **kwargs)[self.residual]
            return (getattr(self, self.norm)(result) if self.norm else result, *others)
        return self.without_heads(hidden, *weights)

    def stock_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the stock class."""
        return super().forward(*args, **kwargs)

    def by_name(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of the stock class's forward by name."""
        stock: Any = stock_class(self)
        named = inspect.signature(stock.forward).bind(self, *args, **kwargs).arguments
        del named["self"]
        rest = named.pop("kwargs", {})
        return {**named, **rest}

    def without_heads(self, hidden: torch.Tensor, *others: Any) -> Any:
        """Return the output without heads, and the rest of the stock class's tuple."""
        result = hidden[..., :0]
        if self.output:
            result = getattr(self, self.output)(result)
        elif self.residual:
            result = torch.zeros_like(hidden)
        if torch.is_grad_enabled():
            # Every parameter takes part: DistributedDataParallel waits for its gradient.
            result = result + 0 * sum(p.sum() for p in self.parameters())
        if not self.returns:
            return result
        whole = (result, *others, *[None] * (self.returns - 1 - len(others)))
        return list(whole) if self.listed else whole


BIASES = {"alibi", "attention_mask", "position_bias", "rel_pos", "rel_2d_pos"}
"""Arguments that can hold a bias for all heads."""


class BiasedHeads(Headless):
    """Attention whose caller adds a bias for all heads: it selects the rows of the kept ones.

    Attributes:
        kept_heads: Positions of the kept heads in the bias; None if no head is missing.
        bias_heads: Number of heads of the bias.
    """

    kept_heads: tuple[int, ...] | None = None
    bias_heads = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock forward on the bias of the kept heads."""
        if self.kept_heads is None:
            return self.stock_forward(*args, **kwargs)
        if not self.kept_heads:
            return super().forward(*args, **kwargs)
        arguments = self.by_name(*args, **kwargs)
        for name in BIASES & set(arguments):
            arguments[name] = self._select(arguments[name])
        return self.stock_forward(**arguments)

    def _select(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Select the kept heads of `[batch, heads, ...]` or `[batch · heads, ...]`."""
        kept = list(self.kept_heads or ())
        if bias is not None and bias.ndim == 4 and bias.shape[1] == self.bias_heads > 1:
            return bias[:, kept]
        if bias is not None and bias.ndim == 3:
            return bias.unflatten(0, (-1, self.bias_heads))[:, kept].flatten(0, 1)
        return bias


class SharedBiasHeads(BiasedHeads):
    """T5's attention: the first layer hands the position bias of all heads to the others."""

    layer_idx: int
    has_relative_attention_bias: bool
    compute_bias: Callable[..., torch.Tensor]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the stock forward on the bias of the kept heads, and return that of all heads."""
        if self.kept_heads is None:
            return self.stock_forward(hidden_states, *args, **kwargs)
        arguments = self.by_name(hidden_states, *args, **kwargs)
        bias = arguments.get("position_bias")
        if bias is None:
            bias = self._bias(arguments)
        if not self.kept_heads:
            return self.without_heads(hidden_states, bias)
        result, _, *rest = self.stock_forward(**arguments | {"position_bias": self._select(bias)})
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
    """Attention that reads its number of heads in the model's config, one number for all layers.

    Attributes:
        count_field: Name of the config field.
        head_count: Number of heads of this module; None if no head is missing.
    """

    count_field = ""
    head_count: int | None = None

    @property
    def config(self) -> Any:
        """The model's config, with this module's number of heads."""
        config = vars(self)["config"]
        if self.head_count is not None:
            config = copy.copy(config)
            name = config.attribute_map.get(self.count_field, self.count_field)
            vars(config)[name] = self.head_count
        return config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock forward, unless no head is left."""
        forward = super().forward if self.head_count == 0 else self.stock_forward
        return forward(*args, **kwargs)


class Inputless(nn.Module):
    """A linear layer without inputs: it returns its bias, or zeros.

    Kernels for linear layers fail on an empty weight, or read memory that nobody wrote.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the bias at every position."""
        weight, bias = self.get_parameter("weight"), self._parameters.get("bias")
        result = inputs.new_zeros(max(weight.shape)) if bias is None else bias
        if torch.is_grad_enabled():
            # Parameters and inputs take part, so that their gradients are zero, not missing.
            result = result + weight.sum() + inputs.sum()
        # A copy, because Falcon adds to it in place.
        return result.expand(*inputs.shape[:-1], -1).clone()


def has_no_inputs(module: nn.Module) -> bool:
    """Return whether a module is a linear layer whose inputs are all removed."""
    dim = 1 if isinstance(module, nn.Linear) else 0
    return isinstance(module, nn.Linear | Conv1D) and module.weight.shape[dim] == 0


class WavLMHeads(Headless):
    """WavLM's attention through its own projection modules, with any set of heads.

    The stock class hands raw weights to torch's multi-head attention. The gate of the relative
    position bias reads slice `h` of the hidden states for head `h` (arXiv 2110.13900, section
    3.1), so that heads keep their original numbers.

    Attributes:
        kept_heads: Original numbers of the kept heads; None if no head is missing.
    """

    kept_heads: tuple[int, ...] | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the output, no attention weights, and the position bias of all heads."""
        stock: Any = self
        batch, length, _ = hidden_states.shape
        all_heads = stock.gru_rel_pos_const.shape[1]
        if position_bias is None:
            position_bias = stock.compute_bias(length, length).repeat(batch, 1, 1)
        numbers = tuple(range(all_heads)) if self.kept_heads is None else self.kept_heads
        if not numbers:
            return self.without_heads(hidden_states, None, position_bias)
        kept = torch.as_tensor(numbers, device=hidden_states.device)
        by_head = hidden_states.view(batch, length, all_heads, -1).transpose(1, 2)[:, kept]
        gates = stock.gru_rel_pos_linear(by_head).view(*by_head.shape[:-1], 2, 4).sum(-1)
        gate_a, gate_b = torch.sigmoid(gates).chunk(2, dim=-1)
        gate = gate_a * (gate_b * stock.gru_rel_pos_const[:, kept] - 1.0) + 2.0
        bias = gate * position_bias.view(batch, all_heads, length, length)[:, kept]
        if attention_mask is not None:
            hidden = attention_mask.ne(1)[:, None, None, :]
            bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        query, key, value = (
            project(hidden_states).view(batch, length, -1, stock.head_dim).transpose(1, 2)
            for project in (stock.q_proj, stock.k_proj, stock.v_proj)
        )
        result = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=stock.dropout if self.training else 0.0
        )
        result = stock.out_proj(result.transpose(1, 2).reshape(batch, length, -1))
        return result, None, position_bias


class AcrossHeads(nn.Module):
    """A norm across the queries or keys of all heads, which returns those of the kept heads.

    Attributes:
        kept_heads: Positions of the kept heads, or groups of heads.
        head_count: Number of heads, or groups, that the norm takes.
    """

    kept_heads: tuple[int, ...] = ()
    head_count = 1

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise all heads, and return the kept ones, `[..., features]`."""
        by_head = super().forward(hidden_states).unflatten(-1, (self.head_count, -1))
        return by_head[..., list(self.kept_heads), :].flatten(-2)


_CLASSES = (
    Headless,
    BiasedHeads,
    SharedBiasHeads,
    CountedHeads,
    WavLMHeads,
    AcrossHeads,
    Inputless,
)
REPLACEMENTS = {cls.__name__: cls for cls in _CLASSES}
NEEDED = {
    **dict.fromkeys(
        (
            *("BeitAttention", "BloomAttention", "FalconAttention", "LayoutLMv3SelfAttention"),
            *("MPNetSelfAttention", "MptAttention"),
        ),
        "BiasedHeads",
    ),
    **dict.fromkeys(("MT5Attention", "T5Attention"), "SharedBiasHeads"),
    **dict.fromkeys(("FunnelRelMultiheadAttention", "Phi3Attention"), "CountedHeads"),
    "WavLMAttention": "WavLMHeads",
}
"""Stock classes of attention that cannot run with some heads missing, and what replaces them."""
FORMER_REPLACEMENTS = ("ConvBertHeads", "DogeHeads", "LongformerHeads", "PvtV2Heads")
"""Classes that only hfslim 0.1.0 had; the file saved beside such a checkpoint has them."""

SETTINGS = {
    **dict.fromkeys(("output", "residual", "norm", "count_field"), str),
    **dict.fromkeys(("returns", "bias_heads", "head_count"), int),
    **{"kept_heads": list, "listed": bool},
}
"""Attributes of replacements, with their types in a blueprint."""


def stock_class(module: nn.Module) -> type:
    """Return the model family's class of a module, also where a replacement is its class."""
    own = [c for c in type(module).__mro__ if not c.__module__.endswith("modeling_hfslim")]
    # A wrapper of torch is a subclass of the family's class; torch's own layers have no other.
    return next((c for c in own[:-1] if not c.__module__.startswith("torch.")), own[0])


def replace_class(module: nn.Module, by: str, **settings: Any) -> None:
    """Make a stock module an instance of a replacement, in place."""
    stock = stock_class(module)
    # Pickle takes dots in a class's name for nested classes.
    path = stock.__module__.replace(".", ":")
    this = importlib.import_module(__name__)
    module.__class__ = getattr(this, f"{by}__{path}__{stock.__name__}")
    for name, value in settings.items():
        setattr(module, name, tuple(value) if isinstance(value, list) else value)


def apply_blueprint(model: nn.Module, blueprint: Any) -> None:
    """Give a stock model, on any device, the shapes of the pruned one, without its weights.

    Raises:
        BlueprintError: The blueprint does not fit the model. The model may be half changed.
    """
    _check_form(blueprint)
    written, blueprint = blueprint, relative_to(model, blueprint)
    for path, kept in blueprint.get("layers", {}).items():
        layers: Any = _find(model, path)
        is_list = isinstance(layers, nn.ModuleList | nn.Sequential)
        if not is_list or not kept or not _ascending(kept, len(layers)):
            raise BlueprintError(f"layers {kept} are not among those of {path!r}")
        keep_layers(layers, kept)
    before = {name: tuple(tensor.shape) for name, tensor in _named_tensors(model)}
    for path, settings in blueprint.get("replaced", {}).items():
        _replace(_find(model, path), path, dict(settings))
    attributes, sized = blueprint.get("attributes", {}), {}
    for path, values in attributes.items():
        _check_attributes(_find(model, path), path, values)
    for path, shape in blueprint.get("shapes", {}).items():
        owner, _, name = path.rpartition(".")
        module = sized[owner] = _find(model, owner)
        stock = module._parameters.get(name, module._buffers.get(name))
        if stock is None or not no_larger(tuple(shape), tuple(stock.shape)):
            had = None if stock is None else list(stock.shape)
            raise BlueprintError(
                f"{path!r} cannot get the shape {shape}: the stock model has {had}"
            )
        new = stock.detach()[tuple(slice(size) for size in shape)].clone()
        if name in module._buffers:
            module._buffers[name] = new
        else:
            module._parameters[name] = nn.Parameter(new, requires_grad=stock.requires_grad)
        if has_no_inputs(module) and not isinstance(module, Inputless):
            # Earlier checkpoints do not list it.
            replace_class(module, "Inputless")
    _Shapes(model, before).check(blueprint)
    for path, values in attributes.items():
        vars(_find(model, path)).update(_as_tuples(values))
    if "digest" in written and written["digest"] != digest(written):
        raise BlueprintError(
            "config.hfslim was changed after hfslim wrote it (its digest is another): restore "
            "config.json, or save the model again"
        )


def relative_to(model: nn.Module, blueprint: dict[str, Any]) -> dict[str, Any]:
    """Return a blueprint with the paths of a model, which may be its base model or one around it.

    As stock loading does with names of weights, the base model's prefix is added or removed, and
    parts of a head that the model does not have are left out.
    """
    prefix = getattr(model, "base_model_prefix", "")
    base = model._modules.get(prefix) if prefix else None
    named = [path for part in PARTS for path in blueprint.get(part, {})]
    own = [p for p in named if p and p.split(".")[0] in (*model._modules, *model._parameters)]

    def translate(path: str) -> str | None:
        first, _, rest = path.partition(".")
        if base is not None:
            inside = not own if not path else path not in own and first in dict(base._modules)
            return f"{prefix}.{path}".rstrip(".") if inside and named else path
        if prefix and first == prefix and path not in own:
            return rest
        return path if path in own or not any(p.split(".")[0] == prefix for p in named) else None

    return {
        name: {new: v for path, v in part.items() if (new := translate(path)) is not None}
        if name in PARTS
        else part
        for name, part in blueprint.items()
    }


LAYER_NUMBERS = ("layer_idx", "layer_id", "seed")
"""Attributes of modules with the position of their layer."""


def keep_layers(layers: nn.ModuleList | nn.Sequential, kept: Sequence[int]) -> None:
    """Keep some layers of a list, and renumber the modules that hold their layer's position."""
    chosen = [layers[i] for i in kept]
    del layers[:]
    layers.extend(chosen)
    for new, (old, layer) in enumerate(zip(kept, layers, strict=True)):
        for module in layer.modules():
            for name in LAYER_NUMBERS:
                if vars(module).get(name) == old:
                    vars(module)[name] = new


def update_sizes(module: nn.Module, groups_stay: bool = False) -> None:
    """Set the size attributes of a module from the shape of its weight.

    Args:
        module: The module.
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
        # Channels can only go where each is a group of its own.
        module.num_channels = module.num_groups = module.weight.shape[0]
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        per_group = module.out_channels // module.groups
        outputs, inputs = module.weight.shape[:2]
        if module.groups > 1 and not groups_stay:
            module.groups = outputs // per_group
        module.out_channels, module.in_channels = outputs, inputs * module.groups


def _check_form(blueprint: Any) -> None:
    parts = PARTS
    if not isinstance(blueprint, dict) or blueprint.get("version") != VERSION:
        found = blueprint.get("version") if isinstance(blueprint, dict) else blueprint
        newer = "update hfslim, or load the folder with the modeling_hfslim.py saved beside it"
        raise BlueprintError(
            f"config.hfslim has version {found!r}, expected {VERSION}: "
            + (newer if type(found) is int else "config.json is damaged, restore it or save again")
        )
    unknown = sorted(set(blueprint) - {"version", "digest", *parts})
    if unknown:
        raise BlueprintError(f"config.hfslim has unknown parts {unknown}, expected {list(parts)}")
    for part, form in parts.items():
        entries = blueprint.get(part, {})
        if not isinstance(entries, dict) or not all(isinstance(v, form) for v in entries.values()):
            raise BlueprintError(f"config.hfslim[{part!r}] must map paths to {form.__name__}s")


def digest(blueprint: dict[str, Any]) -> str:
    """Return a short hash of a blueprint: no check of shapes sees which heads a bias belongs to."""
    parts = {name: blueprint[name] for name in PARTS if blueprint.get(name)}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        message = f"config.hfslim names {path!r}, which {stock_class(model).__name__} lacks"
        raise BlueprintError(message) from None


def _replace(module: nn.Module, path: str, settings: dict) -> None:
    by = settings.pop("by", None)
    for name, value in settings.items():
        # An exact type, because True is an int; a bound, because results get this long.
        fits = type(value) is SETTINGS.get(name)
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
    cls, stock = REPLACEMENTS[by], stock_class(module).__name__
    kinds = {Headless: "Attention", AcrossHeads: "Norm", Inputless: "Linear"}
    kind = next(kind for base, kind in kinds.items() if issubclass(cls, base))
    stock = "Linear" if isinstance(module, nn.Linear | Conv1D) else stock
    foreign = [n for n in settings if not hasattr(cls, n) or n in module._modules]
    if kind.lower() not in stock.lower() or foreign:
        raise BlueprintError(
            f"{path!r} is a {stock}, which {by} with {settings} does not replace, but a {kind}"
        )
    if not _ascending(settings.get("kept_heads", []), MAX_COUNT):
        raise BlueprintError(f"{path!r} keeps heads {settings['kept_heads']}")
    replace_class(module, by, **settings)


SIZES = (
    *("in_features", "out_features", "nx", "nf", "num_embeddings", "embedding_dim"),
    *("normalized_shape", "num_features", "num_channels", "num_groups"),
    *("in_channels", "out_channels", "groups"),
)
"""Attributes that follow from the shape of a module's own weight."""
HEAD_COUNTS = (
    *("num_attention_heads", "num_heads", "n_heads", "n_head", "all_head_size"),
    *("num_key_value_heads", "num_kv_heads", "kv_heads"),
)
"""Attributes that fall in the proportion of the weights in their module."""
HEAD_SIZES = (
    *("split_size", "inner_dim", "attn_dim", "embed_dim", "hidden_size", "hidden_size_output"),
    *("out_dim_projection", "num_key_value_groups"),
)
"""Attributes that do so in some families."""
NEURON_COUNTS = ("intermediate_size", "intermediate_dim", "ffn_dim")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
CHOSEN_EXPERTS = ("top_k", "num_experts_per_tok")
LAYER_COUNTS = ("n_layers", "n_layer", "num_layers", "num_hidden_layers")
BY_DEPTH = ("lambda_init", "residual_scale", "scaling_factor")
"""Attributes that families compute from the depth, in checkpoints of hfslim 0.1.0."""
CHANGED_BY_CUTS = (
    *(*SIZES, *HEAD_COUNTS, *HEAD_SIZES, *NEURON_COUNTS),
    *(*EXPERT_COUNTS, *CHOSEN_EXPERTS, *LAYER_COUNTS),
)
"""All attributes that a blueprint may set, beside those of hfslim 0.1.0."""


def _as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _check_attributes(module: nn.Module, path: str, values: Any) -> None:
    if not isinstance(values, dict):
        raise BlueprintError(f"{path!r} has no settings in {values!r}")
    for name, value in _as_tuples(values).items():
        known = name in vars(module) and name in (*CHANGED_BY_CUTS, *BY_DEPTH)
        old: Any = vars(module).get(name)
        if not known or type(value) is not type(old) or not isinstance(value, int | float | tuple):
            raise BlueprintError(f"{path!r} has no setting {name!r} that could become {value!r}")
        if not no_larger(value, old):
            raise BlueprintError(f"{path}.{name} cannot become {value}: the stock model has {old}")


class _Shapes:
    """Checks what a blueprint tells of modules against the shapes of their weights.

    Args:
        model: The model, with its new shapes and the old attributes.
        before: The shapes of the stock model, without the layers that went.
    """

    def __init__(self, model: nn.Module, before: dict[str, tuple[int, ...]]) -> None:
        self.model = model
        self.changes: dict[str, list[tuple[int, int]]] = {}
        stream = set()
        for name, tensor in _named_tensors(model):
            changes = [(o, n) for o, n in zip(before[name], tensor.shape, strict=True) if n < o]
            if changes:
                self.changes[name] = changes
                owner = model.get_submodule(name.rpartition(".")[0])
                if tensor.ndim == 1 and "norm" in type(owner).__name__.lower():
                    stream.update(changes)
        self.stream = stream

    def check(self, blueprint: dict[str, Any]) -> None:
        """Check the attributes and the replacements of a blueprint."""
        given = blueprint.get("attributes", {})
        sized = {name.rpartition(".")[0] for name in self.changes} | set(given)
        for path, module in self.model.named_modules(remove_duplicate=False):
            values = _as_tuples(given.get(path, {}))
            if path in sized:
                self._check_sizes(path, module, values)
            self._check_heads(path, module, values)
            for name, value in values.items():
                if not self._follows(path, module, name, value):
                    old = vars(module)[name]
                    raise BlueprintError(
                        f"{path}.{name} cannot become {value} where the stock model has {old}: the "
                        f"weights there go from {sorted(set(self._inside(path)))}"
                    )
            self._check_replaced(path, module)

    def _inside(self, path: str, deep: bool = True) -> list[tuple[int, int]]:
        """Return the dimensions that became smaller in the weights below a path."""
        start = f"{path}." if path else ""
        return [
            change
            for name, changes in self.changes.items()
            if name.startswith(start) and (deep or name.count(".") <= start.count(".") + 1)
            for change in changes
        ]

    def _check_sizes(self, path: str, module: nn.Module, values: dict[str, Any]) -> None:
        own = {n: v for n, v in values.items() if n in SIZES}
        had = {name: value for name, value in vars(module).items() if name in SIZES}
        fitting = []
        for groups_stay in (False, True):
            update_sizes(module, groups_stay)
            fitting.append({n: v for n, v in vars(module).items() if had.get(n, v) != v})
            vars(module).update(had)
        if own not in fitting:
            raise BlueprintError(f"{path!r} has {own}, but its weights have {fitting[0]}")

    def _check_heads(self, path: str, module: nn.Module, values: dict[str, Any]) -> None:
        """Check that counts of heads fall where the weights right in the module do."""
        old = {n: vars(module).get(n) for n in HEAD_COUNTS}
        counts = {n: v for n, v in old.items() if type(v) is int and v > 0}
        changes = [c for c in self._inside(path, deep=False) if c not in self.stream]
        for name, count in counts.items() if changes else ():
            wanted = {n * count // o for o, n in changes if n * count % o == 0}
            shared = count == 1 and "k" in name
            if wanted and not shared and values.get(name, count) not in wanted:
                raise BlueprintError(
                    f"{path}.{name} cannot be {values.get(name, count)}: its weights fit {wanted}"
                )
        needed = NEEDED.get(stock_class(module).__name__)
        if changes and needed and not isinstance(module, REPLACEMENTS[needed]):
            raise BlueprintError(f"{path!r} misses heads, and {needed} does not replace it")
        if 0 in (values.get(name) for name in counts) and not isinstance(module, Headless):
            raise BlueprintError(f"{path!r} has no heads, and nothing that replaces it")

    def _follows(self, path: str, module: nn.Module, name: str, value: Any) -> bool:
        old, inside = vars(module)[name], self._inside(path)
        if name in (*HEAD_COUNTS, *HEAD_SIZES):
            return any(n * old == o * value for o, n in inside)
        if name in (*NEURON_COUNTS, *EXPERT_COUNTS):
            return (old, value) in inside
        if name in CHOSEN_EXPERTS:
            around = self._inside(path.rpartition(".")[0])
            return any(n == value < old <= o for o, n in around)
        if name in LAYER_COUNTS:
            lists = [m for m in module.children() if isinstance(m, nn.ModuleList)]
            return any(len(layers) == value for layers in lists)
        return True

    def _check_replaced(self, path: str, module: nn.Module) -> None:
        empty = any(0 in tensor.shape for tensor in module.parameters())
        kept = getattr(module, "kept_heads", None)
        if isinstance(module, AcrossHeads):
            total, inside = module.head_count, self._inside(path.rpartition(".")[0])
        elif isinstance(module, BiasedHeads | WavLMHeads):
            counts = (vars(module).get(name) for name in HEAD_COUNTS)
            count: Any = next((c for c in counts if c), 0)
            total = getattr(module, "bias_heads", count)
            inside = self._inside(path)
            if count and total != count:
                raise BlueprintError(f"{path!r} gets a bias of {total} heads, but has {count}")
        elif isinstance(module, CountedHeads):
            had: Any = getattr(vars(module).get("config"), module.count_field, None)
            fits = module.head_count is not None and type(had) is int
            inside = self._inside(path)
            if not fits or not any(n * had == o * (module.head_count or 0) for o, n in inside):
                raise BlueprintError(f"{path!r} has no {module.head_count} heads in its weights")
            return
        else:
            whole = isinstance(module, Inputless) and not has_no_inputs(module)
            if whole or (isinstance(module, Headless) and not empty):
                raise BlueprintError(f"{path!r} is replaced, but its weights are not empty")
            return
        share = any(n * total == o * len(kept or ()) for o, n in inside)
        if kept is None or not share or not _ascending(list(kept), total):
            raise BlueprintError(f"{path!r} keeps heads {kept} of {total}, unlike its weights")


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    named = (model.named_parameters, model.named_buffers)
    return [pair for names in named for pair in names(remove_duplicate=False)]


def no_larger(new: Any, old: Any) -> bool:
    """Return whether a setting, or each of a tuple, did not grow; a float must be finite."""
    if isinstance(old, tuple):
        return len(new) == len(old) and all(
            type(a) is type(b) and isinstance(a, int) and no_larger(a, b)
            for a, b in zip(new, old, strict=True)
        )
    return math.isfinite(new) if isinstance(old, float) else 0 <= new <= max(old, 0)


def _ascending(kept: list, total: int) -> bool:
    whole = all(type(i) is int and 0 <= i < total for i in kept)
    return whole and list(kept) == sorted(set(kept))


def check_weights(source: str | Path, files: Sequence[str] = ()) -> None:
    """Refuse pickled weights, and weight files outside the folder, before any is read.

    Args:
        source: Folder of the checkpoint, or a Hub id, whose files the Hub client finds.
        files: The weight files that were found.

    Raises:
        BlueprintError: A file is not in the format safetensors, or lies outside the folder.
    """
    # Links are not followed: the Hub client's cache consists of links.
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
    """A mixin for stock model classes: builds the pruned model from the config alone."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        apply_blueprint(self, getattr(config, "hfslim", None))  # type: ignore[arg-type]
        self.hfslim_applied = True

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load as the stock class does, without hfslim's own loader."""
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
        """Return False, so that the checkpoint's keys are read like those of the stock class."""
        return False


def __getattr__(name: str) -> type:
    """Build `Slim<StockModel>` or `<Replacement>__<module>__<StockAttention>` on first use."""
    by, _, rest = name.partition("__")
    bases: tuple[type, type]
    if by in REPLACEMENTS and "__" in rest:
        module, _, stock_name = rest.rpartition("__")
        family = importlib.import_module(module.replace(":", "."))
        bases = (REPLACEMENTS[by], getattr(family, stock_name))
    else:
        stock = getattr(transformers, name[4:], None) if name.startswith("Slim") else None
        if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        bases = (Slim, stock)
        # The names of a checkpoint's weights are converted by the name of the class.
        conversions = conversion_mapping.get_checkpoint_conversion_mapping(stock.__name__)
        if conversions is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(
                name, conversions, overwrite=True
            )
    cls = type(name, bases, {"__module__": __name__, "__doc__": bases[0].__doc__})
    globals()[name] = cls
    return cls
