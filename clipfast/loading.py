"""Loading a model by name, or wrapping one that exists."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from clipfast.errors import InputError, ModelError
from clipfast.mismatches import warn
from clipfast.model import Model, Precision, Tokenize
from clipfast.towers import huggingface_models, openclip_models, timm_models
from clipfast.towers.packages import package_of
from clipfast.towers.sizes import size_of

BUNDLED = {"scenes": Path(__file__).parent / "scenes" / "model"}
"""Models that ship with clipfast, by name."""

logger = logging.getLogger("clipfast")


def load(
    name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    cuda_graphs: bool | int | None = None,
    ignore_hooks: bool = False,
    precision: Precision | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Model:
    """Loads a model by name.

    Args:
        name: any open_clip name, ``"scenes"`` (bundled), ``local-dir:FOLDER`` or a folder, ``hf-hub:REPOSITORY`` with
            an open_clip model, ``hf:REPOSITORY`` or a folder with a model of transformers, ``timm:NAME`` of timm.
        pretrained: a tag that open_clip or timm knows (of timm also ``"default"``), or a checkpoint's path
            (safetensors, or a pickle holding weights only). None gives random weights, with a warning.
        device: where to put it; CUDA when there is one, else the CPU. The logger ``clipfast`` says which at INFO.
        dtype: float32, bfloat16, float16 or float64.
        backend: which kernels compute; ``"auto"`` chooses.
        cuda_graphs: whether forwards whose shapes repeat run as CUDA graphs, which keep memory
            (:attr:`Model.graph_nbytes`); a number is the largest batch for which they do, 0 none. Default wherever the
            model is on a CUDA device.
        ignore_hooks: accept forward hooks that are registered later, as for :func:`wrap`.
        precision: as for :func:`wrap`.
        image_size: as for :func:`wrap`.

    Raises:
        ModelError: no such model, tag or checkpoint, or one that does not fit.
        InputError: a precision that is not possible here, with every reason, or an image size that does not fit.
        UnsupportedTower: a vision tower that cannot be decomposed, with every reason.
    """
    size = None if image_size is None else size_of(image_size)
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    is_huggingface = name.startswith(huggingface_models.PREFIX) or huggingface_models.is_folder(name)
    if is_huggingface and name not in BUNDLED:
        if pretrained is not None:
            raise ModelError(f"{name} brings its own weights: leave pretrained={pretrained!r} out")
        loaded = huggingface_models.create(name, place, dtype)
    elif name.startswith(timm_models.PREFIX):
        loaded = timm_models.create(name, pretrained, place, dtype)
    else:
        source = f"local-dir:{BUNDLED[name]}" if name in BUNDLED else name
        loaded = openclip_models.create(source, pretrained, place, dtype)
    logger.info("%s is loaded on %s in %s", name, place, str(dtype).removeprefix("torch."))
    preprocess = loaded.preprocess
    if size is not None:
        preprocess = package_of(loaded.module).resized_preprocess(loaded.module, size, preprocess)
    model = Model(
        loaded.module,
        preprocess=preprocess,
        tokenize=loaded.tokenize,
        backend=backend,
        cuda_graphs=cuda_graphs,
        pretrained=loaded.pretrained,
        name=name,
        ignore_hooks=ignore_hooks,
        precision=precision,
        image_size=size or loaded.image_size,
    )
    warn(model.mismatches(pretrained))
    return model


def wrap(
    module: nn.Module,
    *,
    tokenize: Tokenize | None = None,
    backend: str = "auto",
    cuda_graphs: bool | int | None = None,
    ignore_hooks: bool = False,
    precision: Precision | None = None,
    image_size: int | tuple[int, int] | None = None,
    projection: Tensor | None = None,
) -> Model:
    """Wraps an existing open_clip CLIP, or its ``.visual``, as it is: weights are shared, not copied.

    ``DataParallel``, ``DistributedDataParallel``, ``torch.compile`` and peft around the model or its ``.visual`` are
    looked through; weights that adapters and parametrisations compute are read as they are. The decomposition computes
    from the weights and runs no forward of the module, so hooks, replaced methods and layers of other classes are
    refused, here and whenever they appear later.

    Args:
        module: the model; later changes of its weights, device or dtype are seen.
        tokenize: strings → tokens ``[T, context]``; default open_clip's own where the vocabulary is its.
        backend: which kernels compute; ``"auto"`` chooses.
        cuda_graphs: whether forwards whose shapes repeat run as CUDA graphs, which keep memory
            (:attr:`Model.graph_nbytes`); a number is the largest batch for which they do, 0 none. Default wherever the
            model is on a CUDA device.
        ignore_hooks: accept forward hooks, which the decomposition does not run: for hooks that only read, such as
            those that log activations. :meth:`Model.verify` shows whether they change the embedding.
        precision: ``"fp8"`` multiplies the MLPs of all tokens in 8 bits, with a scale for every token and every row of
            a weight: for bfloat16 on a GPU of compute capability 9.0 (Hopper) or later. The sum of all terms is then
            still the embedding, and the embedding another: :meth:`Model.verify` compares it with the module's own.
            None, the default, keeps the weights' precision.
        image_size: height and width of the images, or the side of square ones, in pixels, where they are not to be of
            the size that the model is for: as :meth:`Model.resized`.
        projection: a linear map after the model's own embedding, ``[D, D']``, such as a linear probe: everything is
            then of that space.

    Raises:
        UnsupportedTower: a vision tower that cannot be decomposed, with every reason.
        InputError: weights on the meta device or on several devices, a precision that is not possible here, or an image
            size that does not fit.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"wrap takes a torch.nn.Module, not a {type(module).__name__}: clipfast.load takes names")
    package, size = package_of(module), None if image_size is None else size_of(image_size)
    model = Model(
        module,
        preprocess=package.resized_preprocess(module, size) if size else package.default_preprocess(module),
        tokenize=tokenize or package.default_tokenizer(module),
        backend=backend,
        cuda_graphs=cuda_graphs,
        ignore_hooks=ignore_hooks,
        precision=precision,
        image_size=size,
        projection=projection,
    )
    warn(model.mismatches())
    return model
