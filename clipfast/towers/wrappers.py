"""What is wrapped around modules and computes the same: it is looked through."""

from typing import Any, cast

from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``DataParallel``, ``DistributedDataParallel``, ``torch.compile``'s result and peft's models.

    The adapters that peft puts into a module stay: :mod:`clipfast.towers.folding` reads them.
    """
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):  # torch._dynamo's OptimizedModule
            module = cast(nn.Module, module._orig_mod)
        elif type(module).__module__ in _PEFT and isinstance(inner := _inside_peft(module), nn.Module):
            module = inner
        else:
            return module


_PEFT = ("peft.peft_model", "peft.mixed_model", "peft.tuners.lora.model")
"""Modules of the classes that peft puts around a model: ``PeftModel``, ``PeftMixedModel``, ``LoraModel``."""


def _inside_peft(module: Any) -> object:
    """The model that peft's adapters are in."""
    base = getattr(module, "base_model", None)  # a tuner, or with prompts in place of adapters the model itself
    if isinstance(base, nn.Module) and type(module).__module__ != "peft.tuners.lora.model":
        return getattr(base, "model", None) if type(base).__module__.startswith("peft.tuners.") else None
    return getattr(module, "model", None)
