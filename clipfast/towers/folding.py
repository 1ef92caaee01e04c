"""Weights that a module computes from others: adapters of peft, and parametrisations of torch.

A reader takes weights from :func:`folded`, where such layers are plain ones with the weight as it is now. The module
itself stays as it is. What the weights were computed from is listed, so that a tower is read again when it changes.
"""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_LORA = "peft.tuners.lora.layer"
_SAVED = "peft.utils.other"
M = TypeVar("M", bound=nn.Module)


class Folded(NamedTuple):
    """A module without computed weights.

    Attributes:
        module: the same module where it has none; else a copy that shares all parameters but the computed ones.
        sources: the parameters and buffers that weights were computed from.
    """

    module: Any
    sources: tuple[Tensor, ...]


@torch.no_grad()
def folded(module: nn.Module, without: Collection[str] = ()) -> Folded:
    """A module whose computed weights are plain parameters, without changing the module.

    Args:
        module: a model, or a part of one.
        without: children of ``module`` to leave as they are.
    """
    sources: list[Tensor] = []
    return Folded(_fold(module, sources, without), tuple(sources))


def _fold(module: nn.Module, sources: list[Tensor], without: Collection[str] = ()) -> nn.Module:
    """A module or its copy without computed weights; ``sources`` is added to."""
    if _is_saved_copy(module):
        return _fold(_running_copy(module), sources)
    if is_adapter(module):  # one that is refused is left out, so that nothing else is said of it
        layer = cast(Any, module)
        return _fold(layer.base_layer, sources) if _why_not(layer) else _merged(layer, sources)
    children = {
        name: child if child is None or name in without else _fold(child, sources)
        for name, child in module._modules.items()
        if name != "parametrizations" or not parametrize.is_parametrized(module)
    }
    weights = dict(_computed(module, sources))
    if not weights and all(child is module._modules[name] for name, child in children.items()):
        return module
    return copy_with(module, weights, children)


def copy_with(module: M, weights: dict[str, Tensor], children: dict[str, Any] | None = None) -> M:
    """A copy of a module with other weights and children; it shares everything else, and has no hooks that compute."""
    kind = cast(type[M], type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module))
    copy = kind.__new__(kind)
    state = dict(vars(module))
    kept = {name: value for name, value in module._parameters.items() if name not in weights}
    new = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
    hooks = {key: hook for key, hook in module._forward_pre_hooks.items() if not isinstance(hook, COMPUTING_HOOKS)}
    for name in weights:
        state.pop(name, None)
    state.update(_parameters={**kept, **new}, _forward_pre_hooks=hooks)
    state["_modules"] = dict(module._modules if children is None else children)
    vars(copy).update(state)
    return copy


# ------------------------------------------------------------------------------------- parametrisations and old hooks


def _computed(module: Any, sources: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a module's own weights that are computed at each call."""
    if parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():
            yield name, getattr(module, name).detach()
            sources += _tensors(chain)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield hook.name, hook.compute_weight(module).detach()
            sources += [getattr(module, f"{hook.name}_{part}") for part in "gv"]
        elif isinstance(hook, SpectralNorm):
            yield hook.name, hook.compute_weight(module, do_power_iteration=False).detach()
            sources += [getattr(module, f"{hook.name}_{part}") for part in ("orig", "u", "v")]
        elif isinstance(hook, BasePruningMethod):
            name = hook._tensor_name
            yield name, hook.apply_mask(module).detach()
            sources += [getattr(module, f"{name}_{part}") for part in ("orig", "mask")]


COMPUTING_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Forward pre-hooks that compute a weight."""


def _tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor in a module: parameters, buffers and plain attributes."""
    plain = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return [*module.parameters(), *module.buffers(), *plain]


# --------------------------------------------------------------------------------------------------- peft's adapters


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is one of peft's that stand in place of a model's own."""
    return type(module).__module__.startswith("peft.") and (hasattr(module, "base_layer") or _is_saved_copy(module))


def _is_lora(module: nn.Module) -> bool:
    return type(module).__module__ == _LORA and type(module).__name__ in ("Linear", "Conv2d")


def _is_saved_copy(module: nn.Module) -> bool:
    return type(module).__module__ == _SAVED and type(module).__name__ == "ModulesToSaveWrapper"


def _running_copy(module: Any) -> nn.Module:
    """The module that a wrapper of ``modules_to_save`` runs."""
    active = module.active_adapters
    if module.disable_adapters or not active or any(name not in module._adapters for name in active):
        return cast(nn.Module, module.original_module)
    return cast(nn.Module, module.modules_to_save[active[0]])


def _running_adapters(layer: Any) -> list[str]:
    """The adapters that a LoRA layer adds to its base layer."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _merged(layer: Any, sources: list[Tensor]) -> nn.Module:
    """The base layer of a LoRA layer, with ``W + scaling · B A`` for every adapter that runs."""
    base = cast(Any, _fold(layer.base_layer, sources))
    names = _running_adapters(layer)
    if not names:
        return cast(nn.Module, base)
    precise = torch.promote_types(base.weight.dtype, torch.float32)
    weight, bias = base.weight.to(precise), base.bias
    sources.append(base.weight)
    for name in names:
        down, up, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        product = up.weight.flatten(1).to(precise) @ down.weight.flatten(1).to(precise)
        weight = weight + scaling * product.view_as(weight)
        sources += [down.weight, up.weight]
        if up.bias is not None:
            sources += [up.bias] if base.bias is None else [up.bias, base.bias]
            bias = scaling * up.bias.to(precise) + (0 if bias is None else bias.to(precise))
    weights = {"weight": weight.to(base.weight.dtype)}
    if bias is not None and bias is not base.bias:
        weights["bias"] = bias.to(base.weight.dtype)
    return copy_with(base, weights)


def _why_not(layer: Any) -> str | None:
    """Why a layer of peft cannot be read as a plain one; None where it can."""
    kind = type(layer).__name__
    if not _is_lora(layer):
        package = type(layer).__module__.split(".")
        return f"{'.'.join(package[2:3])}.{kind}" if package[:2] == ["peft", "tuners"] else kind
    if layer.merged:
        return "merged and disabled at once, which its forward undoes" if layer.disable_adapters else None
    for name in _running_adapters(layer):
        down, up = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_variant or layer.use_dora.get(name):
            return f"LoRA's variant {type(layer.lora_variant.get(name)).__name__.removesuffix('Variant')}"
        if type(down) is not type(up) or type(down) not in (nn.Linear, nn.Conv2d):
            return f"LoRA with a {type(down).__name__} and a {type(up).__name__}"
        if isinstance(down, nn.Conv2d) and (down.groups != 1 or layer.base_layer.groups != 1):
            return "LoRA of a convolution in groups"
    return None


# ---------------------------------------------------------------------------------------------------------- refusals


def unreadable(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """Reasons why one module's weights cannot be computed: keys of ``CHANGED``, with places."""
    if is_adapter(module) and not _is_saved_copy(module) and (why := _why_not(module)):
        yield "adapter", f"{path}: {why}"
    if module.training and parametrize.is_parametrized(module):
        chains = cast(Any, module.parametrizations).items()
        for name in [name for name, chain in chains if any(isinstance(step, _SpectralNorm) for step in chain)]:
            yield "spectral_norm", f"{path}.{name}"
    for hook in module._forward_pre_hooks.values():
        if module.training and isinstance(hook, SpectralNorm):
            yield "spectral_norm", f"{path}.{hook.name}"
    out = getattr(module, "out_proj", None) if isinstance(module, nn.MultiheadAttention) else None
    if isinstance(out, nn.Module):  # the attention reads its weight, and does not call it
        if is_adapter(out):
            yield "not_run", f"{path}.out_proj: {type(out).__name__}"
        elif not weight_is_read(out):
            yield "not_run", f"{path}.out_proj: a weight that a hook computes"


def weight_is_read(layer: nn.Module) -> bool:
    """Whether the weight that a layer computes with is its ``weight`` before it is called."""
    return not is_adapter(layer) and not any(
        isinstance(hook, COMPUTING_HOOKS) for hook in layer._forward_pre_hooks.values()
    )


def state_of(module: nn.Module) -> tuple[object, ...]:
    """What else than tensors the weights of an adapter, or of a parametrised module, depend on."""
    if is_adapter(module):
        layer = cast(Any, module)
        scaling = tuple(sorted(getattr(layer, "scaling", {}).items()))
        return (layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters), scaling)
    if not parametrize.is_parametrized(module):
        return ()
    steps = [step for chain in cast(Any, module.parametrizations).values() for step in chain]
    return tuple(value for step in steps for value in vars(step).values() if isinstance(value, _SETTINGS))


_SETTINGS = (bool, int, float, str)


def state_of_all(root: nn.Module) -> tuple[object, ...]:
    """:func:`state_of` of every module for which it says anything."""
    return tuple(state_of(module) for module in root.modules() if has_state(module))


def has_state(module: nn.Module) -> bool:
    """Whether :func:`state_of` says anything of a module."""
    return is_adapter(module) or parametrize.is_parametrized(module)
