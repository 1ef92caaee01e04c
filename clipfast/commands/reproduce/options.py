"""Options of ``clipfast reproduce``, its tables and the data sets that they need."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Final, NamedTuple

from cyclopts import Parameter

from clipfast.commands.collect.options import RunOptions, StoreDtype
from clipfast.commands.options import Dtype, Flag, ImageOptions, PoolOptions, Positive, Texts
from clipfast.errors import InputError


class DataSet(NamedTuple):
    """A data set that tables need.

    Attributes:
        option: that it is given with.
        contents: what it is.
        owners: where its owners publish it.
    """

    option: str
    contents: str
    owners: str


class TableInfo(NamedTuple):
    """A table.

    Attributes:
        data: the data set it needs.
        title: what it is.
        classes: whether it needs names of classes.
    """

    data: str
    title: str
    classes: bool = True


DATA: Final = {
    "imagenet": DataSet(
        "--imagenet",
        "ImageNet's validation images (ILSVRC 2012), 50,000 images of 1,000 classes",
        "the ImageNet website, image-net.org",
    ),
    "waterbirds": DataSet(
        "--waterbirds",
        "Waterbirds, 11,788 images of which 5,794 are the test split",
        "its authors' repository kohpangwei/group_DRO",
    ),
    "cub": DataSet(
        "--cub",
        "CUB-200-2011, 11,788 images of 200 species with attributes",
        "Caltech's page Caltech-UCSD Birds-200-2011",
    ),
    "segmentation": DataSet(
        "--imagenet-seg",
        "ImageNet-segmentation, 4,276 images with masks in gtsegs_ijcv.mat",
        "the CALVIN group's page ImageNet auto-annotation with segmentation propagation",
    ),
}

TABLES: Final = {
    "ablations": TableInfo("imagenet", "Accuracy without MLPs, without the class token and without the first layers"),
    "textspan": TableInfo("imagenet", "The texts that span the heads of the last four layers", False),
    "texts": TableInfo("imagenet", "Accuracy with heads replaced by their texts"),
    "joint": TableInfo("imagenet", "Which patch, through which head, towards which text", False),
    "overlap": TableInfo("imagenet", "How much the heads overlap", False),
    "cub": TableInfo("cub", "Accuracy on CUB-200-2011 without MLPs, class token and first layers"),
    "retrieval": TableInfo("cub", "Retrieval by one head: how many of the nearest have the same attribute", False),
    "waterbirds": TableInfo("waterbirds", "Worst-group accuracy on Waterbirds without the heads of the background"),
    "segmentation": TableInfo("segmentation", "Zero-shot segmentation beside other methods"),
}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model.

    Attributes:
        model: An open_clip name (see ``clipfast models``), a model's folder, hf-hub:REPOSITORY or hf:REPOSITORY.
            Default: the bundled model.
        pretrained: A tag of open_clip, or a checkpoint's path.
        published_as: What published numbers call a local checkpoint, such as ViT-L-14/laion2b_s32b_b82k. Default:
            --model and --pretrained.
        batch_size: Images at once.
        device: cpu, cuda or cuda:N. Default: CUDA where there is a device.
        dtype: Precision of the weights. Default: fp32.
    """

    model: str | None = None
    pretrained: str | None = None
    published_as: str | None = None
    batch_size: Positive = 8
    device: str | None = None
    dtype: Dtype | None = None

    def images(self) -> ImageOptions:
        """These options as other commands have them."""
        return ImageOptions(
            model=self.model,
            pretrained=self.pretrained,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which data sets.

    Attributes:
        imagenet: Folder of ImageNet's validation images.
        imagenet_devkit: Folder of ImageNet's development kit or of LOC_val_solution.csv, where it is elsewhere.
        waterbirds: Folder of Waterbirds.
        cub: Folder of CUB-200-2011.
        imagenet_seg: gtsegs_ijcv.mat, or a folder with ``images/`` and ``masks/``.
    """

    imagenet: Path | None = None
    imagenet_devkit: Path | None = None
    waterbirds: Path | None = None
    cub: Path | None = None
    imagenet_seg: Path | None = None

    def place(self, name: str) -> Path | None:
        """Where the data set of :data:`DATA` is, None where it was not given."""
        place: Path | None = getattr(self, "imagenet_seg" if name == "segmentation" else name)
        return place


@dataclass(frozen=True)
class Options:
    """Run the paper's experiments on your weights and data; published numbers stand beside the measured ones.

    A run that was stopped goes on with the same command: tables and collections that are done are kept.

    Attributes:
        model: The model.
        data: The data sets. Tables whose data set is not given are left out.
        only: Run this table: ablations, textspan, texts, joint, overlap, cub, retrieval, waterbirds or segmentation;
            repeat.
        class_names: A CSV file with columns ``label`` and ``text``, for the data sets whose labels it has. Default:
            open_clip's names of ImageNet's 1,000 classes, and the names in the data sets' own files.
        templates: Templates by name (plain, simple, imagenet), or a file with one per line; repeat. Default: OpenAI's
            80, of open_clip.
        naming: The texts that heads are named by.
        size: Texts per head.
        longest: Most texts per head where heads are replaced by them.
        pools: For replacing heads by texts: pools to compare --pool with; repeat. Default: general, common_words,
            classes and random.
        words: For Waterbirds: ablate heads whose texts contain one of these words; repeat. Default: words for scenery
            and places.
        remove: For Waterbirds: ablate these heads, such as "L10.H3, L11.H7", in place of --words.
        attribute: For retrieval: an attribute of CUB-200-2011.
        methods: For segmentation, of ours,attention,rollout,gradcam,chefer,legrad. Default: all.
        store_dtype: Precision in which contributions are kept on disk.
        run: Who computes the pass over a data set.
        out: Folder for results.md, results.json, tables, figures and collections.
        json: Print the JSON instead of the page.
    """

    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    _: KW_ONLY
    only: Texts = ()
    class_names: Path | None = None
    templates: Texts = ()
    naming: PoolOptions = PoolOptions()
    size: Annotated[Positive, Parameter(name=("--size", "-m"))] = 20
    longest: Positive = 60
    pools: Texts = ("general", "common_words", "classes", "random")
    words: Texts = ()
    remove: str | None = None
    attribute: str = "has_primary_color"
    methods: str | None = None
    store_dtype: StoreDtype = "float32"
    run: RunOptions = RunOptions()
    out: Path = Path("out/reproduce")
    json: Flag = False

    def check(self) -> None:
        """Checks what can be checked before anything is read.

        Raises:
            InputError: no data set, or a table that does not exist or whose data set is not given.
        """
        self.run.check()
        unknown = [name for name in self.only if name not in TABLES]
        if unknown:
            raise InputError(f"--only is {unknown[0]!r}: choose from {', '.join(TABLES)}")
        if self.remove is not None and self.words:
            raise InputError("--remove names heads and --words chooses them: give one of them")
        if self.data.imagenet_devkit is not None and self.data.imagenet is None:
            raise InputError("--imagenet-devkit has the labels of --imagenet, which is not given")
        if not any(self.data.place(name) for name in DATA):
            given = ", ".join(each.option for each in DATA.values())
            raise InputError(f"no data set was given: give one or more of {given}")
        for name in self.only:
            if self.data.place(TABLES[name].data) is None:
                raise InputError(f"--only {name} needs {missing(TABLES[name].data)}")

    def tables(self) -> list[str]:
        """The tables to run, in order."""
        chosen = self.only or TABLES
        return [name for name, info in TABLES.items() if name in chosen and self.data.place(info.data) is not None]


def missing(name: str) -> str:
    """What a data set is and where it is from, as part of a sentence."""
    data = DATA[name]
    return f"{data.option}: {data.contents}; see {data.owners}"
