"""Options of ``clipfast collection export``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from clipfast.commands.collect.options import StoreDtype


@dataclass(frozen=True)
class Options:
    """Write a collection in the layout of other programs.

    Attributes:
        collection: The folder.
        out: What is written: a folder, or a file for parquet; it must not exist. Default: out/export.
        layout: clip-retrieval (img_emb/*.npy and metadata/*.parquet), zarr (arrays.zarr, with an array of all images
            for each that was kept, and images.parquet), or parquet (one table).
        heads: For clip-retrieval, codes of these heads in place of embeddings, such as L10-L11 or L11.H3.
        dtype: Precision of numbers for clip-retrieval.
    """

    collection: Annotated[Path, Parameter(name="COLLECTION")]
    _: KW_ONLY
    out: Path | None = None
    layout: Literal["clip-retrieval", "zarr", "parquet"] = "clip-retrieval"
    heads: str | None = None
    dtype: StoreDtype = "float16"
