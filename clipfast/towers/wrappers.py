"""What is wrapped around modules and computes the same: it is looked through."""

from typing import cast

from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``DataParallel``, ``DistributedDataParallel`` and what ``torch.compile`` returns."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):  # torch._dynamo's OptimizedModule
            module = cast(nn.Module, module._orig_mod)
        else:
            return module
