"""A cache of activations with the names, shapes and methods of TransformerLens and ViT-Prisma.

>>> embedding, cache = run_with_cache(model, images)
>>> cache["blocks.3.attn.hook_pattern"], cache["pattern", 3]  # the same, [batch, head, query, key]
>>> stack, labels = cache.decompose_resid(return_labels=True, pos_slice=0)
>>> cache.logit_attrs(stack, ["a red star", "a forest"], pos_slice=0)  # [components, batch, texts]

Names are those of TransformerLens; ViT-Prisma has the same and ``hook_full_embed``, ``hook_ln_pre`` besides. Nothing is
computed before it is asked for. What that costs:

* The pooled row: ``pos_slice="pooled"``, or the class token's position 0 where it is pooled. Everything comes from the
  codes of the one decomposed forward that gave the embedding; one head costs one head, ``B·E·W`` products.
* All tokens: the first name asks for one more forward, which records the residual stream of all layers,
  ``(L + 1)·B·N·W`` numbers. Every other name runs its block again up to there. ``hook_pattern`` and
  ``hook_attn_scores`` take ``B·H·N²`` numbers, ``hook_result`` ``B·N·H·W``; results are not kept in the cache.

Conventions that differ between towers: ``hook_attn_out`` and ``hook_mlp_out`` are what is added to the residual
stream, so with layer scale and norms after the parts. ``hook_result`` is each head's share of it without the bias, with
the norms after the heads frozen. ``hook_q``, ``hook_k`` and ``hook_v`` come before norms of queries and keys and rotary
positions, ``hook_rot_q`` and ``hook_rot_k`` after. ``hook_embed`` has the class token and registers, as TransformerLens
has it for BERT; ViT-Prisma's has the patches alone.

``B`` images, ``N`` tokens (class token first), ``W`` width, ``H`` heads, ``E`` head_dim, ``L`` layers, ``D`` embed_dim.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from clipfast.basis import autocast_disabled
from clipfast.compat.activations import AllTokens, PooledRow, StreamBasis, normed, standard_deviation
from clipfast.errors import InputError
from clipfast.indices import resolve_head, resolve_heads, resolve_layer
from clipfast.kernels.reference import accumulation_dtype
from clipfast.loading import wrap
from clipfast.model import Images, Model
from clipfast.towers.tower import Tower, weights_version

Key: TypeAlias = str | tuple[Any, ...]
NamesFilter: TypeAlias = str | Sequence[str] | Callable[[str], bool]
Position: TypeAlias = int | tuple[int | None, ...] | slice | Sequence[int] | Tensor | Literal["pooled"] | None
Stack: TypeAlias = Tensor | tuple[Tensor, list[str]]

_LAYER: Final = re.compile(r"blocks\.(\d+)\.(.+)")
_SHORT: Final = re.compile(r"([a-z_]+)(\d+)([a-z]?\w*)")
_ALIASES: Final = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}
_PARTS: Final = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
_OF_ATTENTION: Final = {"k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores"}
_OF_MLP: Final = {"pre", "post", "pre_linear"}
_OF_NORMS: Final = {"scale", "normalized"}


class UnknownName(InputError, KeyError):
    """A name that no activation of this tower has; the message says why, or which there are."""

    __str__ = Exception.__str__  # a KeyError would quote it


def run_with_cache(
    model: Model | nn.Module,
    images: Images,
    names_filter: NamesFilter | None = None,
) -> tuple[Tensor, "ActivationCache"]:
    """Embeds images and gives a cache of the activations on the way.

    Args:
        model: a model, or a module that :func:`clipfast.wrap` takes.
        images: ``[B, 3, height, width]`` preprocessed, or PIL images, or paths.
        names_filter: which names the cache has: one, several, or a function of a name; None for all but
            ``hook_result``, which is as large as everything else together and is there when asked for.

    Returns:
        The embedding ``[B, D]``, not normalised, and the cache.

    Raises:
        InputError: images that do not fit, a tower without transformer blocks, MLPs in 8 bits, or a filter that names
            no activation.
        ImageError: a file that cannot be read.
        UnsupportedTower: a vision tower that cannot be decomposed, with every reason.
    """
    if not isinstance(model, Model):
        model = wrap(model)
    tower = model.tower
    if not tower.blocks:
        raise InputError(f"{model.name} has no transformer blocks, and a cache is of those")
    if model.precision is not None:
        raise InputError(f"precision={model.precision!r} has no cache: load the model without it")
    pixels = model.prepare(images)
    row, basis = None, StreamBasis(tower)
    if tower.pooling in ("cls", "mean"):
        row = PooledRow(tower, pixels, basis, model.backend)
        embedding = row.embedding
    else:
        embedding = model.decompose(pixels, depth="pool").embedding
    cache = ActivationCache(model, tower, pixels, embedding, basis, row)
    if names_filter is not None:
        cache.keep(names_filter)
    return embedding, cache


def act_name(name: str, layer: int | None = None, part: str | None = None) -> str:
    """The full name of an activation from a short one, as TransformerLens's ``get_act_name`` forms it.

    >>> act_name("k", 6), act_name("k6"), act_name("scale", 4, "ln1"), act_name("normalized")
    ('blocks.6.attn.hook_k', 'blocks.6.attn.hook_k', 'blocks.4.ln1.hook_scale', 'ln_final.hook_normalized')

    Args:
        name: short, or whole.
        layer: of the activations that every block has.
        part: of a block, where it has several of that name: ``"ln1"`` or ``"ln2"``.
    """
    if layer is None and part is None:
        if "." in name or name.startswith("hook_"):
            return name
        if (match := _SHORT.fullmatch(name)) is not None:
            name, layer, part = match[1], int(match[2]), match[3] or None
    name = _ALIASES.get(name, name)
    if name in _OF_ATTENTION:
        part = "attn"
    elif name in _OF_MLP:
        part = "mlp"
    elif part is not None:
        part = _PARTS.get(part, part)
    if name in _OF_NORMS and layer is None:
        return f"{part or 'ln_final'}.hook_{name}"
    prefix = "" if layer is None else f"blocks.{layer}."
    return f"{prefix}{part + '.' if part else ''}hook_{name}"


class ActivationCache(Mapping[Key, Tensor]):
    """Activations of one batch by name; :func:`run_with_cache` makes it.

    A key is a name, whole or short (``"k6"``), or a tuple of a short name, a layer (negative from the end) and where
    needed ``"ln1"`` or ``"ln2"``. ``dict(cache)`` computes everything and keeps it. Weights must not change meanwhile.

    Attributes:
        model: the model.
        embedding: ``[B, D]``, not normalised.
    """

    def __init__(
        self,
        model: Model,
        tower: Tower,
        pixels: Tensor,
        embedding: Tensor,
        basis: StreamBasis,
        row: PooledRow | None,
    ) -> None:
        self.model = model
        self.embedding = embedding
        self._tower = tower
        self._basis = basis
        self._row = row
        self._all = AllTokens(tower, pixels, model.backend)
        self._version = tower.version()
        self._output_versions = [weights_version(block.output().tensors()) for block in tower.blocks]
        self._known = frozenset(_names(tower))
        self._names = _names(tower)
        self._listed = [name for name in self._names if not name.endswith(".hook_result")]

    def __repr__(self) -> str:
        return f"ActivationCache({len(self.embedding)} images, {self._tower.layers} layers, {len(self)} names)"

    def keep(self, names_filter: NamesFilter) -> None:
        """Leaves only some names, as ``names_filter`` of :func:`run_with_cache`.

        Raises:
            InputError: it names no activation of this tower.
        """
        if callable(names_filter):
            chosen = [name for name in self._names if names_filter(name)]
        else:
            wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            chosen = [self._resolve(name) for name in wanted]
        if not chosen:
            raise InputError("names_filter leaves no name: see cache.keys() without one")
        self._listed = self._names = [name for name in self._names if name in set(chosen)]

    # ------------------------------------------------------------------------------------------------------- a mapping

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]  # names, whole
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str | tuple) and self._resolve(key) in self._names
        except InputError:
            return False

    def __getitem__(self, key: Key) -> Tensor:
        """The activation of all tokens.

        Raises:
            UnknownName: no such name, or one that this tower has not, with the reason.
            InputError: a layer that does not exist, or weights that have changed.
        """
        name = self._resolve(key)
        if name not in self._names:
            raise UnknownName(f"{name} was left out by names_filter: {len(self._names)} others are here")
        return self._computed(lambda: self._activation(name))

    def _resolve(self, key: Key) -> str:
        if isinstance(key, str):
            name = act_name(key)
        else:
            if not key or not isinstance(key[0], str) or len(key) > 3:
                raise UnknownName(f"{key!r} is no name: give (name, layer) or (name, layer, part)")
            short, layer, part = (*key, None, None)[:3]
            name = act_name(short, None if layer is None else resolve_layer(layer, self._tower.layers), part)
        if name not in self._known:
            raise UnknownName(_why_not(self._tower, name))
        return name

    def _computed(self, compute: Callable[[], Tensor], layer: int | None = None) -> Tensor:
        """What a function gives that reads all weights, or those of one layer's output projection alone."""
        if layer is None:
            same = self._tower.version() == self._version
        else:  # looking at all weights takes longer than computing one head
            same = weights_version(self._tower.blocks[layer].output().tensors()) == self._output_versions[layer]
        if not same:
            raise InputError("the weights have changed since these images were embedded: run_with_cache again")
        with torch.no_grad(), autocast_disabled(self.embedding):
            return compute()

    def _activation(self, name: str) -> Tensor:
        tower, tokens = self._tower, self._all
        match = _LAYER.fullmatch(name)
        if match is not None:
            return self._of_block(int(match[1]), match[2])
        if name == "hook_embed":
            return tokens.embedded(positions=False)
        if name == "hook_pos_embed":
            return tokens.positions()
        if name == "hook_full_embed":
            return tokens.embedded(positions=True)
        if name in ("hook_ln_pre", "ln_pre.hook_normalized"):
            return tokens.stream[0]
        if name == "ln_pre.hook_scale":
            assert tower.ln_pre is not None
            return standard_deviation(tokens.embedded(positions=True), tower.ln_pre, self.model.backend)
        assert tower.ln_post is not None
        last = self._read_by_final_norm()
        if name == "ln_final.hook_scale":
            return standard_deviation(last, tower.ln_post, self.model.backend)
        return normed(last, tower.ln_post).to(last.dtype)

    def _read_by_final_norm(self) -> Tensor:
        """What the final LayerNorm reads: all tokens, ``[B, N, W]``, or their mean, ``[B, 1, W]``."""
        last = self._all.stream[-1]
        return last[:, self._tower.pooled_from :].mean(1, keepdim=True) if self._tower.pooling == "mean" else last

    def _of_block(self, layer: int, name: str) -> Tensor:
        if name in ("hook_resid_pre", "hook_resid_post"):
            return self._all.stream[layer + (name == "hook_resid_post")]
        block = self._all.block(layer)
        weights = block.weights
        if name == "attn.hook_result":
            return torch.einsum("bnhe,hew->bnhw", block.codes(), self._basis.values(layer)).to(block.x.dtype)
        if name.endswith("hook_scale"):
            norm, x = (weights.ln_1, block.x) if name.startswith("ln1") else (weights.ln_2, block.middle)
            assert norm is not None
            return standard_deviation(x, norm, self.model.backend)
        compute: dict[str, Callable[[], Tensor]] = {
            "ln1.hook_normalized": lambda: block.normed,
            "attn.hook_q": lambda: block.projected[:, :, 0],
            "attn.hook_k": lambda: block.projected[:, :, 1],
            "attn.hook_v": lambda: block.projected[:, :, 2],
            "attn.hook_rot_q": lambda: block.qkv[:, :, 0],
            "attn.hook_rot_k": lambda: block.qkv[:, :, 1],
            "attn.hook_attn_scores": lambda: block.scores,
            "attn.hook_pattern": lambda: block.scores.softmax(-1),
            "attn.hook_z": lambda: block.out,
            "hook_attn_out": lambda: block.attention,
            "hook_resid_mid": lambda: block.middle,
            "ln2.hook_normalized": lambda: block.mlp_normed,
            "mlp.hook_pre": lambda: block.before_activation(),
            "mlp.hook_pre_linear": lambda: block.before_activation(linear=True),
            "mlp.hook_post": lambda: block.hidden,
            "hook_mlp_out": lambda: block.mlp,
        }
        return compute[name]()

    # --------------------------------------------------------------------------------------------------------- stacks

    def head_result(self, layer: int, head: int, pos_slice: Position = "pooled") -> Tensor:
        """What one head writes into the residual stream, without the output projection's bias.

        Args:
            layer: negative from the end.
            head: head of that layer.
            pos_slice: which tokens; default the pooled row, ``B·E·W`` products.

        Returns:
            ``[B, W]``, or ``[B, positions, W]``.

        Raises:
            InputError: no such layer or head, or no such row.
        """
        layer, head = resolve_layer(layer, self._tower.layers), resolve_head(head, self._tower.heads)
        row = self._row_at(pos_slice)
        if row is not None:
            return self._computed(lambda: row.head(layer, head), layer)
        return self._computed(
            lambda: (
                _sliced(self._all.block(layer).codes(), pos_slice, 1)[..., head, :] @ self._basis.values(layer)[head]
            )
        )

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Position = None,
        apply_ln: bool = False,
        heads: Iterable[tuple[int, int]] | None = None,
    ) -> Stack:
        """What every head of the layers before one writes, ``[components, batch, (pos,) d_model]``.

        All heads of all tokens are ``L·H·B·N·W`` numbers: give ``pos_slice``, or a few ``heads``.

        Args:
            layer: heads strictly before it; -1 or None for all.
            return_labels: give the labels, too: ``"L0H0"``, …
            incl_remainder: a last component with the rest of the residual stream before that layer.
            pos_slice: which tokens; None for all, ``"pooled"`` for the pooled row.
            apply_ln: divide by the LayerNorm's scale, see :meth:`apply_ln_to_stack`.
            heads: some (layer, head) pairs, in place of all before ``layer``.

        Raises:
            InputError: no such layer or head, or no such row.
        """
        layer = self._before(layer)
        if heads is None:
            pairs = [(each, head) for each in range(layer) for head in range(self._tower.heads)]
        else:
            pairs = resolve_heads(heads, self._tower.layers, self._tower.heads)
            if late := [f"L{each}H{head}" for each, head in pairs if each >= layer]:
                raise InputError(f"{late[0]} is not before layer {layer}: leave layer out for all")
        labels = [f"L{each}H{head}" for each, head in pairs]

        def stack() -> Tensor:
            parts = self._heads_of(pairs, pos_slice) if heads is None else self._each_head(pairs, pos_slice)
            if incl_remainder:
                whole = self._stream(layer, pos_slice)
                parts = [*parts, (whole - sum(parts, torch.zeros_like(whole)))]
            if not parts:
                return torch.zeros_like(self._stream(0, pos_slice))[None][:0]
            return torch.stack(parts)

        labels += ["remainder"] if incl_remainder else []
        return self._finished(stack, labels, layer, False, pos_slice, apply_ln, return_labels)

    def _each_head(self, pairs: list[tuple[int, int]], pos_slice: Position) -> list[Tensor]:
        return [self.head_result(layer, head, pos_slice) for layer, head in pairs]

    def _heads_of(self, pairs: list[tuple[int, int]], pos_slice: Position) -> list[Tensor]:
        """All heads of the layers that are named, layer by layer."""
        row = self._row_at(pos_slice)
        parts: list[Tensor] = []
        for layer in dict.fromkeys(layer for layer, _ in pairs):
            if row is not None:
                heads = row.heads(layer)
            else:
                codes = _sliced(self._all.block(layer).codes(), pos_slice, 1)
                heads = torch.einsum("...he,hew->...hw", codes, self._basis.values(layer))
            parts += heads.unbind(-2)
        return parts

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Position = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack:
        """The residual stream before a layer as the sum of what was written into it.

        The embeddings are ``"embed"`` and ``"pos_embed"``. After a LayerNorm before the first block they do not add up
        to the stream, and its output is one component, ``"ln_pre"``; where a module's own layers embed the patches it
        is ``"embed"``.

        Args:
            layer: components strictly before it; -1 or None for all.
            mlp_input: with the attention of ``layer`` itself: what its MLP reads.
            mode: all parts, the MLPs or the attentions.
            apply_ln: divide by the LayerNorm's scale, see :meth:`apply_ln_to_stack`.
            pos_slice: which tokens; None for all, ``"pooled"`` for the pooled row.
            incl_embeds: with the start of the stream.
            return_labels: give the labels, too: ``"embed"``, ``"pos_embed"``, ``"0_attn_out"``, ``"0_mlp_out"``, …

        Returns:
            ``[components, batch, (pos,) d_model]``.

        Raises:
            InputError: no such layer, mode or row, or nothing to stack.
        """
        layer = self._before(layer, mlp_input)
        if mode not in ("all", "mlp", "attn"):
            raise InputError(f"mode is {mode!r}: choose 'all', 'mlp' or 'attn'")
        parts: list[Callable[[], Tensor]] = []
        labels: list[str] = []
        if incl_embeds:
            names, start = self._start(pos_slice)
            labels, parts = labels + names, parts + start
        for each in range(layer + mlp_input):
            if mode != "mlp":
                parts.append(lambda each=each: self._wrote("attn", each, pos_slice))  # type: ignore[misc]
                labels.append(f"{each}_attn_out")
            if mode != "attn" and each < layer:
                parts.append(lambda each=each: self._wrote("mlp", each, pos_slice))  # type: ignore[misc]
                labels.append(f"{each}_mlp_out")
        if not parts:
            raise InputError(f"nothing is before layer {layer} with mode={mode!r} and incl_embeds=False")

        def stack() -> Tensor:
            return torch.stack([part() for part in parts])

        return self._finished(stack, labels, layer, mlp_input, pos_slice, apply_ln, return_labels)

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Position = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack:
        """The residual stream before each layer up to one, as the logit lens reads it.

        Args:
            layer: the last, -1 or None for the end of the stream.
            incl_mid: with the stream between attention and MLP of the layers before.
            apply_ln: with the end of the stream, each state's own final LayerNorm, weight and bias included: times
                the projection it is the embedding that the state gives. With a layer before, see
                :meth:`apply_ln_to_stack`.
            pos_slice: which tokens; None for all, ``"pooled"`` for the pooled row.
            mlp_input: with the stream between attention and MLP of ``layer``.
            return_labels: give the labels, too: ``"0_pre"``, ``"0_mid"``, …, ``"final_post"``.

        Returns:
            ``[components, batch, (pos,) d_model]``.

        Raises:
            InputError: no such layer or row.
        """
        layer = self._before(layer, mlp_input)
        last = layer == self._tower.layers
        states: list[tuple[int, bool]] = []
        for each in range(layer + 1):
            states.append((each, False))
            if (incl_mid and each < layer) or (mlp_input and each == layer):
                states.append((each, True))
        labels = [f"{each}_mid" if middle else f"{each}_pre" for each, middle in states]
        labels[-1] = "final_post" if last else labels[-1]

        def stack() -> Tensor:
            rows = [self._middle(each, pos_slice) if mid else self._stream(each, pos_slice) for each, mid in states]
            stacked = torch.stack(rows)
            if apply_ln and last and self._tower.ln_post is not None:
                return normed(stacked, self._tower.ln_post).to(stacked.dtype)
            return stacked

        return self._finished(stack, labels, layer, mlp_input, pos_slice, apply_ln and not last, return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Position = None,
        return_labels: bool = False,
    ) -> Stack:
        """The residual stream before a layer as heads, neurons or MLPs, embeddings and the sum of all biases.

        Neurons are ``L·M`` components: give ``pos_slice``, or leave ``expand_neurons`` out.

        Args:
            layer: components strictly before it; -1 or None for all.
            mlp_input: with the heads of ``layer`` itself.
            expand_neurons: a component per neuron, not per MLP, with the MLPs' biases among the biases.
            apply_ln: divide by the LayerNorm's scale, see :meth:`apply_ln_to_stack`.
            pos_slice: which tokens; None for all, ``"pooled"`` for the pooled row.
            return_labels: give the labels, too: ``"L0H0"``, …, ``"L0N0"`` or ``"0_mlp_out"``, …, ``"embed"``,
                ``"pos_embed"``, ``"bias"``.

        Returns:
            ``[components, batch, (pos,) d_model]``.

        Raises:
            InputError: no such layer or row, or neurons of MLPs that a norm comes after.
        """
        layer = self._before(layer, mlp_input)
        blocks = self._tower.blocks
        if expand_neurons and any(block.mlp_post_norm is not None for block in blocks[:layer]):
            raise InputError("a norm comes after this tower's MLPs: ask with expand_neurons=False")
        pairs = [(each, head) for each in range(layer + mlp_input) for head in range(self._tower.heads)]
        names, start = self._start(pos_slice)
        labels = [f"L{each}H{head}" for each, head in pairs]
        if expand_neurons:
            labels += [
                f"L{each}N{neuron}" for each in range(layer) for neuron in range(len(blocks[each].mlp_in_weight))
            ]
        else:
            labels += [f"{each}_mlp_out" for each in range(layer)]
        labels += [*names, "bias"]

        def stack() -> Tensor:
            embeds = [part() for part in start]
            parts: list[Tensor] = [torch.stack(self._heads_of(pairs, pos_slice))] if pairs else []
            bias = torch.zeros(self._tower.width, dtype=embeds[0].dtype, device=embeds[0].device)
            for each in range(layer + mlp_input):
                bias = bias + self._basis.bias(each).to(bias.dtype)
            for each in range(layer):
                if expand_neurons:
                    parts.append(self._neurons(each, pos_slice))
                    bias = bias + _scaled(blocks[each].mlp_out_bias, blocks[each].mlp_scale).to(bias.dtype)
                else:
                    parts.append(self._wrote("mlp", each, pos_slice)[None])
            parts += [torch.stack(embeds), bias.expand(embeds[0].shape)[None]]
            return torch.cat(parts)

        return self._finished(stack, labels, layer, mlp_input, pos_slice, apply_ln, return_labels)

    def apply_ln_to_stack(
        self, residual_stack: Tensor, layer: int | None = None, mlp_input: bool = False, pos_slice: Position = None
    ) -> Tensor:
        """Components as a LayerNorm scales them: without their mean, divided by the σ that it had of the whole stream.

        Weight and bias of the norm are left out, as in TransformerLens. A norm without a mean (RMS) takes none away;
        without any norm the stack is returned as it is.

        Args:
            residual_stack: ``[components, batch, (pos,) d_model]``.
            layer: whose norm; -1 or None for the final one. Where a mean of tokens is pooled before it, its σ is that
                of the mean.
            mlp_input: the norm before the MLP.
            pos_slice: what the stack was made with.

        Raises:
            InputError: no such layer, or a pooled mean before a norm that reads every token.
        """
        layer = self._before(layer, mlp_input)
        return self._computed(lambda: self._apply_ln(residual_stack, layer, mlp_input, pos_slice))

    def _apply_ln(self, stack: Tensor, layer: int, mlp_input: bool, pos_slice: Position) -> Tensor:
        tower = self._tower
        final = layer == tower.layers
        block = None if final else tower.blocks[layer]
        norm = tower.ln_post if block is None else block.ln_2 if mlp_input and not block.parallel else block.ln_1
        if norm is None:
            return stack
        row = self._row_at(pos_slice)
        if final and row is not None:
            scale = row.std[:, None]
        elif final and tower.pooling == "mean":
            scale = standard_deviation(self._read_by_final_norm(), norm, self.model.backend)  # [B, 1, 1]
            scale = scale[:, 0] if isinstance(pos_slice, int | np.integer) else scale
        elif row is not None and tower.pooling == "mean":
            raise InputError(f"the norms of layer {layer} read every token: there is no scale of their mean")
        else:
            x = self._middle(layer, pos_slice) if mlp_input else self._stream(layer, pos_slice)
            scale = standard_deviation(x, norm, self.model.backend)
        if scale.ndim != stack.ndim - 1 or scale.shape[0] != stack.shape[1]:
            raise InputError(f"a stack of shape {list(stack.shape)} was not made with pos_slice={pos_slice!r}")
        stack = stack if norm.rms else stack - stack.mean(-1, keepdim=True)
        return stack / scale

    def logit_attrs(
        self,
        residual_stack: Tensor,
        texts: str | Sequence[str] | Tensor,
        incorrect_texts: str | Sequence[str] | Tensor | None = None,
        pos_slice: Position = None,
    ) -> Tensor:
        """How much each component adds to the cosine of the embedding with texts.

        The components of :meth:`decompose_resid` at the pooled row and :meth:`logit_constant` add up to the cosine
        itself. Of the other tokens it is what they would add if they were pooled.

        Args:
            residual_stack: ``[components, batch, (pos,) d_model]``.
            texts: one string or feature ``[D]``, or several, ``[T, D]``; features are used as long as they are.
            incorrect_texts: as many, whose share is subtracted.
            pos_slice: what the stack was made with.

        Returns:
            ``[components, batch, (pos)]`` for one text, and a last axis of texts for several.

        Raises:
            InputError: texts that do not fit, or an attention pool, which no single row is read from.
        """
        directions, norm = self._directions(texts, incorrect_texts), self.embedding.to(torch.float64).norm(dim=-1)
        readout = self._readout(directions)
        stack = self.apply_ln_to_stack(residual_stack, None, False, pos_slice)
        shape = (1, -1, *[1] * (stack.ndim - 2))
        result: Tensor = (stack.to(readout.dtype) / norm.to(readout.dtype).view(shape)) @ readout
        return result[..., 0] if directions.ndim == 1 else result

    def logit_constant(
        self,
        texts: str | Sequence[str] | Tensor,
        incorrect_texts: str | Sequence[str] | Tensor | None = None,
    ) -> Tensor:
        """What the final LayerNorm's bias and the projection's add to the cosine with texts, ``[batch]`` or with texts.

        Args:
            texts: as for :meth:`logit_attrs`.
            incorrect_texts: as for :meth:`logit_attrs`.
        """
        tower, directions = self._tower, self._directions(texts, incorrect_texts)
        self._readout(directions)
        columns = directions.view(-1, directions.shape[-1]).T
        constant = columns.new_zeros(columns.shape[1])
        if tower.ln_post is not None:
            constant = constant + tower.ln_post.bias.to(columns.dtype) @ self._projected(columns)
        if tower.projection_bias is not None:
            constant = constant + tower.projection_bias.to(columns.dtype) @ columns
        result = constant / self.embedding.to(columns.dtype).norm(dim=-1, keepdim=True)
        return result[:, 0] if directions.ndim == 1 else result

    # --------------------------------------------------------------------------------------------- parts of the stacks

    def _directions(self, texts: Any, incorrect: Any) -> Tensor:
        """Features of texts, ``[D]`` for one and ``[T, D]`` for several."""
        result = self._features(texts)
        if incorrect is not None:
            other = self._features(incorrect)
            if other.shape != result.shape:
                raise InputError(
                    f"texts are {list(result.shape)} and incorrect_texts {list(other.shape)}: give as many"
                )
            result = result - other
        return result

    def _features(self, texts: Any) -> Tensor:
        width, dtype = self._tower.embed_dim, accumulation_dtype(self._tower.dtype)
        if not isinstance(texts, Tensor):
            features = self.model.encode_text(texts)
            texts = features[0] if isinstance(texts, str) else features
        if texts.ndim not in (1, 2) or texts.shape[-1] != width or not texts.is_floating_point():
            raise InputError(f"texts has shape {list(texts.shape)}, expected strings or features [texts, {width}]")
        return texts.detach().to(self._tower.device, dtype)

    def _projected(self, columns: Tensor) -> Tensor:
        """Texts as columns of the width before the projection, ``[D, T] → [W, T]``."""
        projection = self._tower.projection
        return columns if projection is None else projection.to(columns.dtype) @ columns

    @torch.no_grad()
    def _readout(self, directions: Tensor) -> Tensor:
        """What a scaled component is multiplied with, ``[W, T]``."""
        if self._tower.pool is not None:
            raise InputError("an attention pool reads all tokens of this model: use model.decompose and its scores")
        matrix = self._projected(directions.view(-1, directions.shape[-1]).T)
        norm = self._tower.ln_post
        return matrix if norm is None else norm.weight.to(matrix.dtype)[:, None] * matrix

    def _before(self, layer: int | None, mlp_input: bool = False) -> int:
        """The number of a layer, ``L`` for the end of the stream."""
        count = self._tower.layers
        if layer is None or layer == -1 or layer == count:
            if mlp_input:
                raise InputError("mlp_input needs a layer: there is no MLP at the end of the stream")
            return count
        return resolve_layer(layer, count)

    def _row_at(self, pos_slice: Position) -> PooledRow | None:
        """The pooled row where it is what is asked for, else None: all tokens are needed."""
        if isinstance(pos_slice, str):
            if pos_slice != "pooled":
                raise InputError(f"pos_slice is {pos_slice!r}: give positions, or 'pooled'")
            if self._row is None:
                raise InputError("this tower pools after its final norm, and no row is pooled: give pos_slice=None")
            return self._row
        if self._tower.pooling != "cls" or not isinstance(pos_slice, int | np.integer) or isinstance(pos_slice, bool):
            return None
        return self._row if pos_slice in (0, -self._tower.tokens) else None

    def _stream(self, layer: int, pos_slice: Position) -> Tensor:
        row = self._row_at(pos_slice)
        return _sliced(self._all.stream[layer], pos_slice, 1) if row is None else row.stream[layer]

    def _middle(self, layer: int, pos_slice: Position) -> Tensor:
        if self._tower.blocks[layer].parallel:
            raise InputError(_why_not(self._tower, f"blocks.{layer}.hook_resid_mid"))
        row = self._row_at(pos_slice)
        if row is None:
            return _sliced(self._all.block(layer).middle, pos_slice, 1)
        return row.stream[layer] + row.attention(layer)

    def _wrote(self, part: Literal["attn", "mlp"], layer: int, pos_slice: Position) -> Tensor:
        row = self._row_at(pos_slice)
        if row is not None:
            return row.attention(layer) if part == "attn" else row.mlp(layer)
        block = self._all.block(layer)
        return _sliced(block.attention if part == "attn" else block.mlp, pos_slice, 1)

    def _start(self, pos_slice: Position) -> tuple[list[str], list[Callable[[], Tensor]]]:
        """Labels of the components that the stream begins with, and how to compute them."""
        tower, tokens = self._tower, self._all
        row = self._row_at(pos_slice)  # refuses a row that there is not, before anything is computed
        if tower.embedder is not None or tower.ln_pre is not None or tower.positional_embedding is None:
            label = "embed" if tower.ln_pre is None else "ln_pre"
            return [label], [lambda: self._stream(0, pos_slice)]

        def read(x: Tensor) -> Tensor:
            if row is None:
                return _sliced(x, pos_slice, 1)
            return x[:, 0] if tower.pooling == "cls" else x[:, tower.pooled_from :].mean(1)

        parts = [lambda: read(tokens.embedded(positions=False)), lambda: read(tokens.positions())]
        return ["embed", "pos_embed"], parts

    def _neurons(self, layer: int, pos_slice: Position) -> Tensor:
        """What every neuron of an MLP writes, ``[M, batch, (pos,) d_model]``."""
        block, weights = self._all.block(layer), self._tower.blocks[layer]
        row = self._row_at(pos_slice)
        hidden = block.hidden
        if row is None:
            hidden = _sliced(hidden, pos_slice, 1)
        else:
            hidden = hidden[:, 0] if self._tower.pooling == "cls" else hidden[:, self._tower.pooled_from :].mean(1)
        out = (
            weights.mlp_out_weight if weights.mlp_scale is None else weights.mlp_scale[:, None] * weights.mlp_out_weight
        )
        return torch.einsum("...m,wm->m...w", hidden, out)

    def _finished(
        self,
        stack: Callable[[], Tensor],
        labels: list[str],
        layer: int,
        mlp_input: bool,
        pos_slice: Position,
        apply_ln: bool,
        return_labels: bool,
    ) -> Stack:
        def compute() -> Tensor:
            components = stack()
            return self._apply_ln(components, layer, mlp_input, pos_slice) if apply_ln else components

        result = self._computed(compute)
        return (result, labels) if return_labels else result


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _sliced(x: Tensor, pos_slice: Position, dim: int) -> Tensor:
    """Some positions of an axis: one, which drops it, a range ``(from, to)``, or several."""
    if pos_slice is None:
        return x
    index: Any = pos_slice
    if isinstance(index, tuple):
        index = slice(*index)
    elif isinstance(index, Sequence | np.ndarray) and not isinstance(index, str):
        index = torch.as_tensor(index, device=x.device)
    try:
        return x[(slice(None),) * dim + (index,)]
    except (IndexError, TypeError) as error:
        raise InputError(f"pos_slice is {pos_slice!r}: tokens are 0 to {x.shape[dim] - 1}") from error


# ---------------------------------------------------------------------------------------------------------------- names


def _names(tower: Tower) -> list[str]:
    """The names that a tower has, in the order of its forward."""
    names = []
    if tower.embedder is None:
        names.append("hook_embed")
        names += ["hook_pos_embed"] if tower.positional_embedding is not None else []
        names.append("hook_full_embed")
        names += ["ln_pre.hook_scale"] if tower.ln_pre is not None else []
    names += ["ln_pre.hook_normalized", "hook_ln_pre"] if tower.ln_pre is not None else []
    for layer, block in enumerate(tower.blocks):
        parts = ["hook_resid_pre"]
        parts += ["ln1.hook_scale", "ln1.hook_normalized"] if block.ln_1 is not None else []
        parts += ["attn.hook_q", "attn.hook_k", "attn.hook_v"]
        parts += ["attn.hook_rot_q", "attn.hook_rot_k"] if block.rotary is not None else []
        parts += ["attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "attn.hook_result", "hook_attn_out"]
        parts += [] if block.parallel else ["hook_resid_mid"]
        parts += ["ln2.hook_scale", "ln2.hook_normalized"] if block.ln_2 is not None else []
        parts.append("mlp.hook_pre")
        parts += ["mlp.hook_pre_linear"] if block.mlp_gate_weight is not None else []
        parts += ["mlp.hook_post", "hook_mlp_out", "hook_resid_post"]
        names += [f"blocks.{layer}.{part}" for part in parts]
    names += ["ln_final.hook_scale", "ln_final.hook_normalized"] if tower.ln_post is not None else []
    return names


def _why_not(tower: Tower, name: str) -> str:
    """Why a tower has no activation of that name, in one line."""
    match = _LAYER.fullmatch(name)
    layer, part = (None, name) if match is None else (int(match[1]), match[2])
    if layer is not None and layer >= tower.layers:
        return f"{name}: layers are 0 to {tower.layers - 1}"
    reasons = {
        "hook_resid_mid": "attention and MLP of this block read the same norm, and nothing is between them",
        "ln1": "no norm comes before this block's attention: it reads hook_resid_pre",
        "ln2": "no norm of its own comes before this block's MLP",
        "attn.hook_rot_q": "this tower has no rotary positions",
        "attn.hook_rot_k": "this tower has no rotary positions",
        "mlp.hook_pre_linear": "this block's MLP is not gated",
        "ln_pre": "this tower has no norm before its first block",
        "hook_ln_pre": "this tower has no norm before its first block",
        "ln_final": "this tower has no norm after its last block",
        "hook_pos_embed": "this tower adds no positions before its first block",
    }
    if tower.embedder is not None and ("embed" in part or part.startswith("ln_pre")):
        return f"{name}: the module's own layers embed the patches, and only blocks.0.hook_resid_pre is known"
    key = part if part in reasons else part.partition(".")[0]
    if key in reasons:
        return f"{name}: {reasons[key]}"
    return f"there is no activation {name!r}: see list(cache)"
