"""Options of ``clipfast collection export``."""

from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from clipfast.commands.collect.options import StoreDtype
from clipfast.commands.options import ClassOptions, Positive
from clipfast.errors import InputError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TextSpanOptions:
    """What the layout clip_text_span has besides.

    Attributes:
        zeroshot: The classes of the classifier.
        dataset_name: For clip_text_span: name of the data set in the files' names. Default: that of the collection.
        model_name: For clip_text_span: name of the model in the files' names. Default: that of the collection's model.
        arrays: For clip_text_span: which contributions, of attn, mlp and cls_attn, with commas between. Default: all.
        classifier: For clip_text_span: write the classifier of labelled images; it needs the model.
        pool: For clip_text_span: write these texts, their features, and the texts of heads: general, classes,
            common_words, scenes, or a file with one text per line.
        size: For clip_text_span: texts per head.
        rank: For clip_text_span: dimensions of a head's outputs that count. Default: all.
        device: For clip_text_span: where texts are encoded. Default: CUDA where there is a device.
    """

    zeroshot: ClassOptions = ClassOptions()
    dataset_name: str | None = None
    model_name: str | None = None
    arrays: str | None = None
    classifier: Annotated[bool, Parameter(negative="--no-classifier")] = True
    pool: str | None = None
    size: Annotated[Positive, Parameter(name=("--size", "-m"))] = 20
    rank: Positive | None = None
    device: str | None = None


@dataclass(frozen=True)
class Options:
    """Write a collection in the layout of other programs.

    Attributes:
        collection: The folder.
        out: What is written: a folder, or a file for parquet; it must not exist. Default: out/export.
        layout: clip-retrieval (img_emb/*.npy and metadata/*.parquet), zarr (arrays.zarr, with an array of all images
            for each that was kept, and images.parquet), parquet (one table), or clip_text_span (the .npy and .txt files
            that scripts of the paper's package read; --out may hold others already).
        heads: For clip-retrieval, codes of these heads in place of embeddings, such as L10-L11 or L11.H3. For
            clip_text_span, the heads that --pool names. Default there: those of the last four layers.
        dtype: Precision of numbers for clip-retrieval.
        text_span: What clip_text_span has besides.
    """

    collection: Annotated[Path, Parameter(name="COLLECTION")]
    _: KW_ONLY
    out: Path | None = None
    layout: Literal["clip-retrieval", "zarr", "parquet", "clip_text_span"] = "clip-retrieval"
    heads: str | None = None
    dtype: StoreDtype = "float16"
    text_span: TextSpanOptions = TextSpanOptions()

    def check(self) -> None:
        """Checks what can be checked before anything is read.

        Raises:
            InputError: options of another layout.
        """
        if self.layout == "clip_text_span":
            if self.dtype != Options.dtype:
                raise InputError("--dtype is for clip-retrieval: numbers of clip_text_span are float32")
            return
        for setting in fields(self.text_span):
            if getattr(self.text_span, setting.name) != setting.default:
                option = "--classes" if setting.name == "zeroshot" else f"--{setting.name.replace('_', '-')}"
                raise InputError(f"{option} is for --layout clip_text_span, not for {self.layout}")
