"""Detects modules whose forward computes something else than their class and their weights say.

A decomposition reads weights and runs its own forward. Hooks, methods replaced on an instance or on its class, and
weights that are computed from others would pass unnoticed, and every number would be wrong without an error.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from clipfast.towers import folding

CHANGED: dict[str, str] = {
    "training": "dropout in training mode: call .eval() first",
    "replaced": "a layer that is not the one its class comes with",
    "adapter": "an adapter other than peft's LoRA: merge it into the weights first (in peft: merge_and_unload)",
    "quantised": "quantised weights: load the model in floating point",
    "spectral_norm": "spectral_norm in training mode, which changes with every call: call .eval() first",
    "not_run": "a computed weight that nn.MultiheadAttention does not compute: remove it, or fold it into the weight",
    "hook": "a forward hook, which may change activations: remove it, or pass ignore_hooks=True if it only reads",
    "global_hook": "a forward hook on all modules: remove it, or pass ignore_hooks=True if it only reads",
    "forward": "a replaced method, which the decomposition does not run: restore that of the class",
}
"""Why a module of any package is refused that is not as its class makes it, by a short key."""

METHODS = (
    *("forward", "__call__", "attention", "get_weight_dtype", "_embeds", "_pool", "_global_pool"),
    *("interpolate_pos_encoding", "resize_positional_embeddings"),  # of transformers
    *("forward_features", "forward_head", "pool", "_pos_embed", "get_embed"),  # of timm
    *("get_bias", "_get_rel_pos_bias"),
)
"""Methods of a tower's modules that a forward pass runs."""

SETTINGS = (
    *("eps", "num_heads", "pool_type", "final_ln_after_pool", "approximate", "scaled_cosine", "dropout", "p"),
    *("num_attention_heads", "scale", "scaling", "use_head", "is_causal", "head_dim", "act"),  # of transformers
    *("global_pool", "pool_include_prefix", "num_prefix_tokens", "no_embed_class", "drop_prob", "prob"),
    *("img_size", "feat_shape", "rotate_half", "gate_last", "bias_gain", "rope_mixed"),  # of timm
)
"""Attributes of a tower's modules that a decomposition depends on."""

QUANTISED = ("torch.ao.nn.", "torch.nn.quantized.", "bitsandbytes.", "torchao.", "optimum.quanto.", "quanto.")
ADAPTERS = ("peft.", "loralib.", "adapters.")
READ_ONLY = (
    "torch.utils.module_tracker",
    "transformers.utils.output_capturing",
    "clipfast.compat.clip_text_span",
)
"""Modules whose hooks and methods change nothing: of ``torch.utils.flop_counter.FlopCounterMode``, of
``output_attentions``, and of :func:`clipfast.compat.clip_text_span.hook_prs_logger`.
"""


class Patch(NamedTuple):
    """One change of a module.

    Attributes:
        reason: a key of :data:`CHANGED`.
        place: where, and what it is.
    """

    reason: str
    place: str


def plain_type(module: nn.Module) -> type[nn.Module]:
    """A module's class; that of a parametrised module is the one it had before."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def replacement(module: object) -> str:
    """The reason for refusing a module that stands where one of another class is expected."""
    kind = type(module)
    home = f"{kind.__module__}."
    if home.startswith(QUANTISED):
        return "quantised"
    if home.startswith(ADAPTERS) or hasattr(module, "lora_A") or hasattr(module, "base_layer"):
        return "adapter"
    return "replaced"


def patches(root: nn.Module, *, ignore_hooks: bool = False, runs: Iterable[nn.Module] = ()) -> list[Patch]:
    """Every patch of a module and of the modules in it, in their order.

    Args:
        root: a vision tower.
        ignore_hooks: leave out forward hooks.
        runs: modules in it that a decomposition runs as they are, whatever they do: they are left out.
    """
    listed = [] if ignore_hooks else _global_hooks()
    kinds: set[type] = set()
    as_they_are = {id(module) for part in runs for module in part.modules()}
    for path, module in _modules(root):
        if id(module) in as_they_are:
            continue
        listed += _of_instance(path, module, ignore_hooks)
        kinds.add(plain_type(module))
    methods = sorted({place for kind in kinds for place in _replaced_methods(kind)})
    return listed + [Patch("forward", place) for place in methods]


class Signature:
    """Detects modules that were replaced, patched or set otherwise, and parameters that are other tensors.

    Everything is compared with what it was when this was made.

    Checked at every call; it takes 50 µs for a tower of twelve blocks.

    Args:
        root: a vision tower.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self.root = root
        self._modules = modules
        self._states = [vars(module) for module in modules]
        kinds = {plain_type(module): None for module in modules}
        self._settings = [(state, name) for state in self._states for name in SETTINGS if name in state]
        self._settings += [(state, "training") for state in self._states if _drops(state) or _normalises(state)]
        self._computing = [module for module in modules if folding.has_state(module)]
        self._methods = [(kind, name) for kind in kinds for name in METHODS if hasattr(kind, name)]
        self._known = self._current()

    def changed(self) -> bool:
        """Whether anything differs from when this was made."""
        return self._current() != self._known

    def _current(self) -> list[list[Any]]:
        states = self._states
        parameters = chain.from_iterable(map(dict.values, map(itemgetter("_parameters"), states)))
        children = chain.from_iterable(map(dict.values, map(itemgetter("_modules"), states)))
        return [
            list(map(id, parameters)),
            list(map(id, children)),
            list(map(type, self._modules)),
            list(map(len, states)),  # a method replaced on an instance is one attribute more
            list(map(len, map(itemgetter("_forward_hooks"), states))),
            list(map(len, map(itemgetter("_forward_pre_hooks"), states))),
            [state.get(name) for state, name in self._settings],
            [getattr(kind, name) for kind, name in self._methods],
            list(map(folding.state_of, self._computing)),
            [self.root.training, len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks)],
        ]


def _drops(state: dict[str, Any]) -> bool:
    """Whether a module, given its attributes, drops values at random in training mode."""
    return any(isinstance(state.get(name), float) and state[name] > 0 for name in _RATES)


_RATES = ("dropout", "p", "prob", "attention_dropout", "drop_prob", "dropout_prob")


def _normalises(state: dict[str, Any]) -> bool:
    """Whether a module, given its attributes, normalises over the batch in training mode."""
    return state.get("_buffers", {}).get("num_batches_tracked") is not None


def drops_now(root: nn.Module) -> bool:
    """Whether a module in ``root`` is in training mode and drops values at random."""
    return any(module.training and _drops(vars(module)) for module in root.modules())


def normalises_over_batches(root: nn.Module) -> bool:
    """Whether a module in ``root`` is batch normalisation in training mode."""
    return any(module.training and _normalises(vars(module)) for module in root.modules())


def is_replaced(module: nn.Module, method: str) -> bool:
    """Whether a method stands among a module's own attributes and is not known to compute the same."""
    own = vars(module).get(method)
    return own is not None and getattr(own, "__module__", "") not in READ_ONLY


def _modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, without those that parametrisations are made of."""
    for path, module in root.named_modules():
        if "parametrizations" not in path.split("."):
            yield path, module


def _global_hooks() -> list[Patch]:
    hooks = [*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()]
    return [Patch("global_hook", _name(hook)) for hook in hooks if getattr(hook, "__module__", "") not in READ_ONLY]


def _of_instance(path: str, module: nn.Module, ignore_hooks: bool) -> list[Patch]:
    place = path or type(module).__name__
    listed = []
    listed += [Patch(*found) for found in folding.unreadable(module, place)]
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        reads_only = ignore_hooks or getattr(hook, "__module__", "") in READ_ONLY
        if not reads_only and not isinstance(hook, folding.COMPUTING_HOOKS):
            listed.append(Patch("hook", f"{place}: {_name(hook)}"))
    for name in METHODS:
        if name in vars(module) and callable(getattr(type(module), name, None)):
            listed.append(Patch("forward", _join(path, name)))
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter.data) is not torch.Tensor or not parameter.dtype.is_floating_point:
            kind = type(parameter.data).__name__ if parameter.dtype.is_floating_point else str(parameter.dtype)
            listed.append(Patch("quantised", f"{_join(path, name)}: {kind}"))
    return listed


def _replaced_methods(kind: type) -> list[str]:
    """Methods of a class that were put there from another module than the one that defines the class."""
    replaced = []
    for name in METHODS:
        owner = next((base for base in kind.__mro__ if name in vars(base)), None)
        if owner is None or owner.__module__ not in sys.modules:
            continue
        if _globals(vars(owner)[name], owner.__module__) is not vars(sys.modules[owner.__module__]):
            replaced.append(f"{owner.__qualname__}.{name}")
    return replaced


def _globals(function: Any, module: str) -> dict[str, Any] | None:
    """The globals of a method, without decorators that the class's own package puts around it."""
    package = module.partition(".")[0]
    function = function.__func__ if isinstance(function, staticmethod) else function
    while hasattr(function, "__wrapped__") and str(function.__module__).partition(".")[0] == package:
        if str(function.__globals__.get("__name__")).partition(".")[0] != package:
            break
        function = function.__wrapped__
    return getattr(function, "__globals__", None)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))


def sentence(reason: str, places: Iterable[str], most: int = 3) -> str:
    """A reason followed by the places where it applies; of many, the first few."""
    listed = list(dict.fromkeys(places))
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"{reason} ({', '.join(listed[:most])}{more})" if listed else reason
