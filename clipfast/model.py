"""A CLIP model whose image embeddings can be taken apart."""

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clipfast import fp8
from clipfast.arguments import check_depth, check_request, default_depth, factors, pictures_of, strings_of
from clipfast.basis import Basis, Centring, Depth, TowerBasis, check_centring, fold
from clipfast.contributions import Contributions, refuse_gradients
from clipfast.errors import InputError
from clipfast.fingerprint import Weights, fingerprint
from clipfast.forward import Maps, Request, decompose
from clipfast.graphs import ANY_BATCH, Graphs
from clipfast.indices import resolve_layers
from clipfast.kernels import dispatch, tuning
from clipfast.mismatches import known, mismatches
from clipfast.reading import ImageBatches, OnError, Picture, computing, prepared
from clipfast.summary import Summary, summarise
from clipfast.towers import folding, openclip_models
from clipfast.towers.packages import Package, package_of
from clipfast.towers.patches import Signature
from clipfast.towers.projected import projected
from clipfast.towers.sizes import size_of
from clipfast.towers.tower import Tower, views_detached
from clipfast.towers.wrappers import unwrap
from clipfast.transfer import Upload
from clipfast.verification import Verification, verify

Images: TypeAlias = Tensor | Picture | Sequence[Picture]
Precision = Literal["fp8"]
Tokenize: TypeAlias = Callable[[Sequence[str]], Tensor]


logger = logging.getLogger("clipfast")


class Model:
    """A CLIP model whose image embeddings can be taken apart.

    Attributes:
        module: the model itself, unmodified, without what is wrapped around it.
        name: as it was loaded, or the class of a wrapped tower.
        preprocess: PIL image → ``[3, height, width]``; called in several threads at once.
        backend: which kernels compute.
        precision: of the MLPs' products: ``"fp8"``, or None for that of the weights.
        pretrained: whether weights were loaded; False means random ones. None when wrapped: not known.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        preprocess: Callable[[Image.Image], Tensor],
        tokenize: Tokenize | None,
        backend: str = "auto",
        cuda_graphs: bool | int | None = None,
        pretrained: bool | None = None,
        name: str | None = None,
        ignore_hooks: bool = False,
        precision: Precision | None = None,
        image_size: tuple[int, int] | None = None,
        projection: Tensor | None = None,
    ) -> None:
        try:
            dispatch.check(backend)
        except dispatch.BackendUnavailable as error:
            raise InputError(str(error)) from error
        self.module = unwrap(module)
        visual = self._package.vision_module(module)
        self.name = name or type(self.module if isinstance(visual, nn.ModuleDict) else visual).__name__
        self._wrapped = module
        self._ignore_hooks = ignore_hooks
        self._image_size = image_size
        self._projection = projection
        self._tower = self._read()
        self._signature = Signature(visual)
        self._weights, self._text_weights, self._source_weights = Weights(), Weights(), Weights()
        self._sources = self._source_weights.all(self._tower.sources)
        self.preprocess = preprocess
        self.backend = backend
        self.precision = precision
        self._mlps: tuple[int, fp8.Mlps] | None = None
        self._check_precision(self._tower)
        self.pretrained = pretrained
        self._tokenize = tokenize
        self._bases: dict[tuple[Centring, Depth, int, int], TowerBasis] = {}
        self._text_basis: tuple[Tensor, tuple[Centring, Depth, tuple[int, int]], Basis] | None = None
        self._cuda_graphs, self._graphs = cuda_graphs, _graphs(cuda_graphs, self._tower.device)
        self._compiled: set[Hashable] = set()
        self._text_features: tuple[tuple[str, ...], int, Tensor] | None = None

    @property
    def _package(self) -> Package:  # not kept: a Python module cannot be copied or pickled with the model
        return package_of(self.module)

    def __repr__(self) -> str:
        """Name, device, dtype, size and backends, on one line."""
        tower = self.tower
        usable = (
            backend.name
            for backend in dispatch.BACKENDS
            if not backend.unsupported_reasons() and not backend.auto_skip_reasons(next(iter(tower.tensors())))
        )
        backends = f"auto ({', '.join(usable)})" if self.backend == "auto" else self.backend
        size = f"{tower.layers} layers of {tower.heads} heads, {tower.width} → {tower.embed_dim}"
        dtype = str(tower.dtype).removeprefix("torch.")
        if self.precision is not None:
            dtype += f", MLPs in {self.precision}"
        return f"Model({self.name}, {tower.device}, {dtype}, {size}, backend {backends})"

    def _read(self) -> Tower:
        size: dict[str, tuple[int, int]] = {} if self._image_size is None else {"image_size": self._image_size}
        tower = self._package.read(self.module, ignore_hooks=self._ignore_hooks, **size)
        devices = {str(tensor.device) for tensor in tower.tensors()}
        if "meta" in devices:
            raise InputError(f"weights of {self.name} are on the meta device and have no values: load them first")
        if len(devices) > 1:
            raise InputError(f"weights of {self.name} are on {', '.join(sorted(devices))}: move them to one device")
        inner = tower.blocks[0].out_weight.shape[1] if tower.blocks else 0
        if inner % tower.heads:
            raise InputError(f"{tower.heads} heads do not divide the {inner} numbers of {self.name}'s attention evenly")
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in factors(tower)})
        if len(dtypes) > 1:
            raise InputError(f"weights of {self.name} are in {' and '.join(dtypes)}: convert them to one dtype")
        return views_detached(tower if self._projection is None else projected(tower, self._projection))

    @property
    def tower(self) -> Tower:
        """The vision tower as plain tensors, shared with ``module``.

        It is read again, and refused again, when a parameter or a layer was replaced, a hook registered or a
        ``forward`` overridden.

        Raises:
            UnsupportedTower: the module was changed into one that cannot be decomposed, with every reason.
        """
        if torch.compiler.is_compiling():  # compiled code is guarded by the tensors themselves
            return self._tower
        visual = self._package.vision_module(self._wrapped)
        derived = self._tower.sources and self._source_weights.all(self._tower.sources) != self._sources
        if derived or visual is not self._signature.root or self._signature.changed():
            signature = Signature(visual)
            self._tower, self._signature = self._read(), signature
            self._sources = self._source_weights.all(self._tower.sources)
            self._bases, self._text_basis = {}, None  # they hold on to the weights that were replaced
            self._graphs.forget()
        return self._tower

    def resized(self, height: int, width: int) -> "Model":
        """A model of the same module for images of another size, with preprocessing for it.

        Positions are interpolated as the module's own package does it. Weights are shared, and the module stays as it
        is. A preprocessing that was put in place of the package's own is not taken over.

        Args:
            height: of the images, in pixels.
            width: of the images, in pixels.

        Raises:
            InputError: not whole patches, or a module whose positions its package does not interpolate.
        """
        size = size_of((height, width))
        return Model(
            self._wrapped,
            preprocess=self._package.resized_preprocess(self.module, size, self.preprocess),
            tokenize=self._tokenize,
            backend=self.backend,
            cuda_graphs=self._cuda_graphs,
            pretrained=self.pretrained,
            name=self.name,
            ignore_hooks=self._ignore_hooks,
            precision=self.precision,
            image_size=size,
            projection=self._projection,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tower.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it reads, in pixels."""
        return self.tower.image_size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.tower.dtype

    @property
    def graph_nbytes(self) -> int:
        """Bytes of GPU memory that CUDA graphs have reserved: of the largest forward's intermediate results once per
        stream, and of each graph's images and results. At most 8 graphs are kept.
        """
        return self._graphs.nbytes

    def fingerprint(self) -> str:
        """A digest of all vision weights, 32 hexadecimal digits: see :func:`clipfast.fingerprint.fingerprint`.

        Every byte is read each time, about 13 ms for ViT-B-32 on a CPU.
        """
        return fingerprint(self.tower)

    def mismatches(self, pretrained: str | None = None) -> list[str]:
        """What does not belong together in the model, in one line each: nothing where all is well or not known.

        Args:
            pretrained: the tag, or the checkpoint's path, that the model was loaded with.
        """
        trained = openclip_models.trained_on(self.name, pretrained)
        return mismatches(
            self.module,
            self.tower,
            name=self.name,
            preprocess=self.preprocess,
            tokenize=self._tokenize,
            trained=known(trained),
        )

    def describe(self) -> Summary:
        """What the model is: its sizes, images, texts, and what a decomposition takes; printed, it is a table."""
        return summarise(
            self.tower,
            self.module,
            name=self.name,
            pretrained=self.pretrained,
            depth=self.depth,
            preprocess=self.preprocess,
            tokenize=self._tokenize,
        )

    @property
    def depth(self) -> Depth:
        """Whose heads a decomposition has by default: ``"pool"``, an attention pool's; ``"all"``, the blocks'."""
        return default_depth(self.tower)

    @property
    def layers(self) -> int:
        """Layers of a decomposition by default, ``L``: 1 for :attr:`depth` ``"pool"``."""
        tower = self.tower
        return 1 if default_depth(tower) == "pool" else tower.layers

    @property
    def heads(self) -> int:
        """Heads per layer of a decomposition by default, ``H``."""
        tower = self.tower
        if default_depth(tower) == "all":
            return tower.heads
        return 1 if tower.pool is None else tower.pool.heads

    def basis(self, centring: Centring = "uniform", depth: Depth | None = None) -> TowerBasis:
        """The model's part of every contribution, made once per centring and depth and again when weights change."""
        tower = self.tower
        depth = check_depth(tower, depth)
        if torch.compiler.is_compiling():  # made anew in the graph: its weights may change between calls
            return fold(tower, check_centring(centring), depth=depth)
        return self._basis(tower, check_centring(centring), depth, self._weights_state(tower))

    def _weights_state(self, tower: Tower) -> tuple[int, int]:
        """Two numbers, one of which changes when a vision weight does."""
        return self._weights.of_tower(tower)

    def _basis(self, tower: Tower, centring: Centring, depth: Depth, state: tuple[int, int]) -> TowerBasis:
        key = (centring, depth, *state)
        if key not in self._bases:
            self._bases = {old: basis for old, basis in self._bases.items() if old[2:] == state}
            read_fingerprint = partial(_fingerprint_of, tower, self._weights, state[1])
            self._bases[key] = fold(tower, centring, None, read_fingerprint, depth)
        return self._bases[key]

    def _check_precision(self, tower: Tower) -> None:
        if self.precision is None:
            return
        if self.precision not in get_args(Precision):
            raise InputError(f"precision is {self.precision!r}: choose 'fp8', or None for that of the weights")
        reasons = fp8.unsupported_reasons(tower, self.backend)
        if reasons:
            raise InputError(f"precision='fp8' is not possible here: {'; '.join(reasons)}")

    def _quantized(self, tower: Tower, state: int) -> fp8.Mlps | None:
        """The MLPs in float8, made again when weights change; None where they keep their precision."""
        if self.precision is None:
            return None
        if self._mlps is None or self._mlps[0] != state:
            self._check_precision(tower)
            self._mlps = state, fp8.quantize(tower, self.backend)
        return self._mlps[1]

    def text_basis(self, text_features: Tensor, centring: Centring = "uniform", depth: Depth | None = None) -> Basis:
        """:meth:`basis` with texts as columns; the last one is kept, for the next batch with the same texts.

        Args:
            text_features: ``[T, D]``.
            centring: as for :meth:`decompose`.
            depth: as for :meth:`decompose`.
        """
        tower = self.tower
        depth = check_depth(tower, depth)
        if torch.compiler.is_compiling():
            return fold(tower, check_centring(centring), text_features, depth=depth)
        return self._folded_texts(tower, text_features, check_centring(centring), depth, self._weights_state(tower))

    def _folded_texts(
        self, tower: Tower, text_features: Tensor, centring: Centring, depth: Depth, state: tuple[int, int]
    ) -> Basis:
        kept, key = self._text_basis, (centring, depth, state)
        if kept is None or kept[1] != key or not _same(kept[0], text_features):
            basis = fold(tower, centring, text_features, depth=depth)
            self._text_basis = kept = (text_features.clone(), key, basis)
        return kept[2]

    def prepare(self, images: Images) -> Tensor:
        """Preprocesses images into the tower's input, ``[B, 3, height, width]`` on its device and in its dtype.

        Args:
            images: a preprocessed tensor ``[B, 3, height, width]``, or PIL images, or paths, which are read in threads.

        Raises:
            ImageError: a file that cannot be read.
            InputError: a tensor of another shape.
        """
        return self._prepare(images, self.tower)

    def _prepare(self, images: Images, tower: Tower) -> Tensor:
        height, width = tower.image_size
        if isinstance(images, Tensor):
            if images.ndim != 4 or images.shape[1:] != (3, height, width):
                raise InputError(
                    f"images has shape {list(images.shape)}, expected [images, 3, {height}, {width}], preprocessed"
                )
            if not images.is_floating_point():
                raise InputError(f"images are {images.dtype}: preprocess them to floating point first")
            return images.to(tower.device, tower.dtype)
        if isinstance(images, Image.Image | str | PathLike):
            images = [images]
        pictures = pictures_of(images)
        if not pictures:
            return torch.empty(0, 3, height, width, device=tower.device, dtype=tower.dtype)
        (batch,) = self.batches(pictures, len(pictures))
        return batch

    def batches(self, images: Iterable[Picture], size: int = 32, *, on_error: OnError = "raise") -> ImageBatches:
        """The input for any number of images, in their order: files are read in threads while the last batch is used.

        >>> for pixels in model.batches(paths, size=8):
        ...     contributions = model.decompose(pixels)

        Args:
            images: paths, or PIL images. PIL images that are not decoded yet are decoded in the calling thread, since
                two of them may share a file.
            size: images per batch, ``[size, 3, height, width]`` on the model's device and in its dtype.
            on_error: ``"raise"`` ends at an image that cannot be read; ``"skip"`` leaves it out and goes on.

        Returns:
            An iterator over tensors. Its ``skipped`` lists the images left out so far, each with its position and
            error, and its ``indices`` are the positions of the last batch's images.

        Raises:
            ImageError: a file that cannot be read, when its batch is asked for and ``on_error`` is ``"raise"``.
            InputError: ``size`` is below 1, or another ``on_error``.
        """
        upload = Upload()
        return prepared(self.preprocess, images, size, on_error, lambda batch: upload(batch, self.device, self.dtype))

    @torch.no_grad()
    def _encode_image(self, pixels: Tensor) -> Tensor:
        if not len(pixels):  # open_clip's own forward cannot
            return pixels.new_empty(0, self.tower.embed_dim)
        return self._projected(self._package.encode_image(self._wrapped, pixels))

    def _projected(self, embedding: Tensor) -> Tensor:
        return embedding if self._projection is None else embedding @ self._projection.to(embedding)

    def too_long(self, texts: Sequence[str]) -> list[int]:
        """Positions of the texts that :meth:`encode_text` refuses because the model cannot read so many tokens.

        Raises:
            InputError: no tokenizer.
        """
        if not texts:
            return []
        tokenize = self._tokenizer()
        long = []
        for position, text in enumerate(texts):
            try:
                tokenize([text])
            except InputError:
                long.append(position)
        return long

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens of texts, ``[T, context]``; :class:`InputError` where the model has no tokenizer."""
        return self._tokenizer()(list(texts))

    def _tokenizer(self) -> Tokenize:
        if self._tokenize is None:
            raise InputError("this model has no tokenizer: wrap it with tokenize=… or pass texts as features [T, D]")
        return self._tokenize

    def encode_image(self, images: Images, normalize: bool = True) -> Tensor:
        """The model's own image embeddings by its own forward, ``[B, D]``, without gradients.

        Args:
            images: ``[B, 3, height, width]`` preprocessed, or PIL images, or paths.
            normalize: whether to give each unit norm.

        Raises:
            ImageError: a file that cannot be read.
            InputError: a tensor of another shape, or one that requires gradients.
        """
        pixels = self.prepare(images)
        refuse_gradients(images=pixels)
        return _finish(self._encode_image(pixels), normalize)

    @torch.no_grad()
    def encode_text(self, texts: Iterable[str] | Tensor, normalize: bool = True) -> Tensor:
        """Text features, ``[T, D]``.

        Args:
            texts: strings, or tokens ``[T, context]``.
            normalize: whether to give each unit norm.

        Raises:
            InputError: no text encoder, no tokenizer, no texts, or a text longer than the model reads.
        """
        if not isinstance(texts, Tensor):
            texts = strings_of(texts)
        if not len(texts):
            raise InputError("no texts were given")
        if not self._package.has_text_encoder(self.module):
            raise InputError("this model has no text encoder: pass texts as features [T, D]")
        tokens = texts if isinstance(texts, Tensor) else self._tokenizer()(texts)
        return _finish(self._package.encode_text(self.module, tokens, self.device), normalize)

    def decompose(
        self,
        images: Images,
        *,
        texts: Iterable[str] | Tensor | None = None,
        labels: Sequence[str] | None = None,
        maps: Maps | None = None,
        attention: bool = False,
        tokens: bool = False,
        class_token: bool = False,
        layers: Sequence[int] | None = None,
        centring: Centring = "uniform",
        depth: Depth | None = None,
    ) -> Contributions:
        """Takes image embeddings apart into layers, heads and tokens, in one forward pass.

        Args:
            images: ``[B, 3, height, width]`` preprocessed, or PIL images, or paths.
            texts: what to draw maps for: strings, or features ``[T, D]``.
            labels: names of the texts in the result, :attr:`Contributions.texts`; the strings themselves for None.
            maps: ``"summed"`` over heads, ``"per_head"``, or None for no maps (``"summed"`` when texts are given).
            attention: keep the pooled token's attention weights, ``[B, L, H, N]``.
            tokens: keep what :meth:`Contributions.tokens` needs (as much memory as the values of every kept layer).
            class_token: keep what :meth:`Contributions.class_token` needs: the class token's own part of every head.
            layers: which layers to keep per head, negative from the end; default all. The others' attention is kept
                as one sum.
            centring: how the final mean is split over the terms: ``"uniform"`` (the paper's code) or ``"termwise"``.
            depth: which heads. ``"all"``: those of the blocks. ``"pool"``: those of the pooling, as one layer; a mean
                is one head. Default ``"all"``, but ``"pool"`` where an attention pool reads the tokens. Before such a
                pool, or a mean of the tokens' final LayerNorms, ``"all"`` keeps what every block wrote until the end:
                two tensors ``[B, N, W]`` per layer, five where attention or maps are asked for.

        Raises:
            ImageError: a file that cannot be read.
            InputError: an argument that does not fit, or one that requires gradients: there are none.
        """
        tower = self.tower  # looked up once: every time it is checked for changes
        pixels = self._prepare(images, tower)
        if texts is None and (maps is not None or labels is not None):
            raise InputError(f"maps={maps!r} needs texts" if maps is not None else "labels name texts: give texts, too")
        if maps not in (None, "summed", "per_head"):
            raise InputError(f"maps is {maps!r}: choose 'summed' or 'per_head'")
        if texts is not None and not isinstance(texts, Tensor):
            texts = strings_of(texts)
            labels = texts if labels is None else labels
        features = None if texts is None else self._features(texts, tower)
        refuse_gradients(images=pixels, texts=features)
        names = None if labels is None else strings_of(labels)
        if features is not None and names is not None and len(names) != len(features):
            raise InputError(f"{len(names)} labels for {len(features)} texts: give one per text")
        depth = check_depth(tower, depth)
        check_request(tower, depth, tokens=tokens, class_token=class_token)
        count, state = 1 if depth == "pool" else tower.layers, (0, 0)
        text_basis = partial(self.text_basis, depth=depth)
        if torch.compiler.is_compiling():
            basis = self.basis(centring, depth)
            mlps = None if self.precision is None else fp8.quantize(tower, self.backend)
        else:  # weights are read for changes once
            state = self._weights_state(tower)
            basis, mlps = self._basis(tower, check_centring(centring), depth, state), self._quantized(tower, state[1])
            text_basis = partial(self._folded_texts, tower, depth=depth, state=state)
        request = Request(
            layers=tuple(range(count)) if layers is None else resolve_layers(layers, count),
            text_basis=None if features is None else text_basis(features, centring),
            maps=maps or ("summed" if texts is not None else None),
            attention=attention,
            tokens=tokens,
            class_token=class_token,
            centring=check_centring(centring),
            backend=self.backend,
            mlps=mlps,
            depth=depth,
        )
        result = self._run(tower, pixels, request, basis, state)
        return result if names is None else replace(result, texts=names)

    def verify(self, images: Images, *, tolerance: float | None = None) -> Verification:
        """Compares the decomposed embedding with the module's own forward, and says where they part.

        >>> print(model.verify(images))
        agrees with the module's own embedding: largest relative error 3.1e-07 (tolerance 1e-04)

        Args:
            images: ``[B, 3, height, width]`` preprocessed, or PIL images, or paths; a few are enough.
            tolerance: relative error up to which the two agree; default by dtype.

        Raises:
            InputError: no images, or ones that do not fit.
            ImageError: a file that cannot be read.
        """
        pixels = self.prepare(images)
        if not len(pixels):
            raise InputError("no images were given: one or more are needed to compare forwards")
        embedding = self.decompose(pixels).embedding
        own_embedding, own_stream = self._package.own_forward(self._wrapped, pixels)
        own_embedding = self._projected(own_embedding)
        tower = self.tower
        return verify(
            tower,
            pixels,
            embedding,
            own_embedding,
            own_stream,
            backend=self.backend,
            tolerance=tolerance,
            mlps=self._quantized(tower, self._weights_state(tower)[1]),
        )

    def _run(
        self, tower: Tower, images: Tensor, request: Request, basis: TowerBasis, state: tuple[int, int]
    ) -> Contributions:
        if torch.compiler.is_compiling() or not images.is_cuda:
            if torch.compiler.is_compiling() or tower.device.type != "cpu":
                return decompose(tower, images, request, basis)
            with computing():
                return decompose(tower, images, request, basis)
        self._compile_ahead(tower, images, request, basis)
        if not self._graphs.takes(images):
            return decompose(tower, images, request, basis)
        return self._replayed(tower, images, request, basis, state)

    def _replayed(
        self, tower: Tower, images: Tensor, request: Request, basis: TowerBasis, state: tuple[int, int]
    ) -> Contributions:
        """A forward as a CUDA graph, from the second of its kind on."""
        # A basis is made anew when weights change. Its number stands for it: a key must not keep it.
        texts = None if request.text_basis is None else request.text_basis.serial
        key = (replace(request, text_basis=None), texts, basis.serial, state)
        return self._graphs.run(images, key, lambda static: decompose(tower, static, request, basis))

    def _compile_ahead(self, tower: Tower, images: Tensor, request: Request, basis: TowerBasis) -> None:
        """Compiles the kernels of a kind of forward side by side, before its first call times them one by one."""
        texts = None if request.text_basis is None else request.text_basis.columns
        kind = (images.shape, images.dtype, images.device, replace(request, text_basis=None), texts)
        if kind in self._compiled or not tuning.enabled() or torch.cuda.is_current_stream_capturing():
            return
        self._compiled.add(kind)
        try:
            with tuning.compiling_ahead():
                decompose(tower, images, request, basis)
        except Exception as error:  # the call itself says what is wrong, if anything is
            logger.debug("kernels are compiled one by one: %s", error)

    def _features(self, texts: tuple[str, ...] | Tensor, tower: Tower) -> Tensor:
        """Text features ``[T, D]`` on the model's device; those of the last strings are kept."""
        if isinstance(texts, Tensor):
            if texts.ndim != 2 or texts.shape[1] != tower.embed_dim:
                raise InputError(f"texts has shape {list(texts.shape)}, expected [texts, {tower.embed_dim}]")
            if not texts.is_floating_point():
                raise InputError(f"texts are {texts.dtype}: give strings, or features in floating point")
            if not len(texts):
                raise InputError("no texts were given: leave texts out for no maps")
            return texts.to(tower.device)
        if torch.compiler.is_compiling():
            raise InputError("compiled code reads no strings: pass texts=model.encode_text(texts)")
        version = hash((self._text_weights.all(self.module.parameters()), folding.state_of_all(self.module)))
        kept = self._text_features
        if kept is None or kept[:2] != (texts, version):
            self._text_features = kept = (texts, version, self.encode_text(texts))
            if kept[2].shape[1] != tower.embed_dim:
                widths = f"{kept[2].shape[1]} wide, and its image embeddings {tower.embed_dim}"
                raise InputError(f"the model's text features are {widths}: give texts as features")
        return kept[2]


def _fingerprint_of(tower: Tower, weights: Weights, state: int) -> str:
    """A tower's fingerprint, unless its weights have changed since ``weights.all`` of them was ``state``."""
    if weights.all(tower.tensors()) != state:
        raise InputError("the weights have changed since these images were decomposed: decompose them again")
    return fingerprint(tower)


def _finish(features: Tensor, normalize: bool) -> Tensor:
    return F.normalize(features, dim=-1) if normalize else features


def _graphs(option: bool | int | None, device: torch.device) -> Graphs:
    largest = ANY_BATCH if option is None or option is True else int(option)
    if largest < 0:
        raise InputError(f"cuda_graphs is {largest}: it is the largest batch to capture, 0 for none")
    if option and device.type != "cuda":
        raise InputError(f"cuda_graphs needs a model on a CUDA device, and this one is on {device}")
    return Graphs(largest)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
