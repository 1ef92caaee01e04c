"""The model and the data sets that tables work on, each opened when a table first needs it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clipfast.analyses.moments import Moments
from clipfast.commands import console
from clipfast.commands.collect.options import KeptOptions
from clipfast.commands.options import MODEL
from clipfast.commands.pools import fitting, read_pool
from clipfast.commands.reproduce.options import TABLES, Options
from clipfast.commands.reproduce.published import model_name
from clipfast.commands.running import Job, Placed, run_shown
from clipfast.commands.scenes.command import write_csv
from clipfast.commands.zeroshot import Classes, Groups, Labelled, read_class_texts
from clipfast.dataset.benchmarks.cub import read_cub
from clipfast.dataset.benchmarks.imagenet import read_imagenet
from clipfast.dataset.benchmarks.layout import Benchmark
from clipfast.dataset.benchmarks.segmentation import (
    MaskedFolders,
    count_segmentation,
    extract,
    find_segmentation,
    masked_folders,
)
from clipfast.dataset.benchmarks.waterbirds import read_waterbirds
from clipfast.dataset.collection import Collection
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.labelling import COLUMNS, Labeller
from clipfast.dataset.passes import PassOptions
from clipfast.descriptions.templates import read_templates
from clipfast.errors import InputError
from clipfast.model import Model
from clipfast.towers.openclip_names import imagenet_names, imagenet_templates

OPEN_CLIP = "open_clip"
"""Where names and templates are from that are open_clip's."""
OWN = "the data set's own files"
_CLASSES = 1000


@dataclass(frozen=True)
class Named:
    """Classes of a data set.

    Attributes:
        classes: labels with their texts.
        source: where the names are from.
    """

    classes: Classes
    source: str


class Workbench:
    """The model and the data sets of a run.

    Args:
        options: of the command.
        model: that they name.
        placed: where passes are computed.

    Attributes:
        options: of the command.
        model: that they name.
        out: folder of the results.
    """

    def __init__(self, options: Options, model: Model, placed: Placed) -> None:
        self.options, self.model, self.out = options, model, options.out
        self._placed = placed
        self._benchmarks: dict[str, Benchmark | InputError] = {}
        self._collections: dict[str, Collection] = {}
        self._labelled: dict[str, Labelled] = {}
        self._pools: dict[str, list[str]] = {}

    @property
    def name(self) -> str:
        """The model and its weights as published numbers name them."""
        model = self.options.model
        return model_name(model.model, model.pretrained, model.published_as)

    # ----------------------------------------------------------------------------------------------------- data sets

    def benchmark(self, name: str) -> Benchmark:
        """The labelled images of a data set, read once.

        Raises:
            InputError: not the data set's layout.
        """
        if name not in self._benchmarks:
            try:
                self._benchmarks[name] = self._read(name)
            except InputError as error:
                self._benchmarks[name] = error
        read = self._benchmarks[name]
        if isinstance(read, InputError):
            raise read
        return read

    def _read(self, name: str) -> Benchmark:
        place = self.options.data.place(name)
        assert place is not None
        if name == "imagenet":
            return read_imagenet(place, self.options.data.imagenet_devkit)
        return read_waterbirds(place) if name == "waterbirds" else read_cub(place)

    def collection(self, name: str) -> Collection:
        """The contributions of a data set's images, collected where they are not yet.

        Raises:
            ClipfastError: another layout, no readable image, or a collection of other images or weights.
            KeyboardInterrupt: a signal has arrived; what is done is kept.
        """
        if name not in self._collections:
            folder = self.out / "collections" / name
            folder.parent.mkdir(parents=True, exist_ok=True)
            benchmark = self.benchmark(name)
            images = benchmark.write_list(folder.parent / f"{name}.csv")
            options = self.options
            how = PassOptions(
                kept=KeptOptions(store_dtype=options.store_dtype).kept(),
                batch_size=options.model.batch_size,
                model=options.model.model or MODEL,
                pretrained=options.model.pretrained,
                retry_failed=True,
                max_error_rate=options.run.max_error_rate,
            )
            labeller = Labeller(COLUMNS, group=("group",) if benchmark.groups else ())
            job = Job(folder, open_inputs([images], skip=folder), labeller, self.model, how)
            run_shown(job, options.run, self._placed)
            self._collections[name] = Collection(folder)
        return self._collections[name]

    def moments(self, name: str) -> Moments:
        """Of all images of a data set; raises as :meth:`collection`."""
        return self.collection(name).moments

    def named_from(self, own: str) -> str:
        """The data set that heads are named from: ImageNet where it is given, as in the paper, else a table's own."""
        return own if self.options.data.imagenet is None else "imagenet"

    def labelled(self, name: str) -> Labelled:
        """A data set with its classifier; raises as :meth:`collection`."""
        if name not in self._labelled:
            classes = self.classes(name).classes  # before anything slow
            collection = self.collection(name)
            groups = Groups.of(collection.entries)
            self._labelled[name] = Labelled(collection, self.model, classes, groups, classes.classifier(self.model))
        return self._labelled[name]

    def masked(self) -> MaskedFolders:
        """The images with masks, as files.

        Raises:
            InputError: another layout.
            MissingExtra: a ``.mat`` file, and h5py is not installed.
        """
        given = self.options.data.place("segmentation")
        assert given is not None
        place = find_segmentation(given)
        if place.is_dir():
            return masked_folders(place)
        with console.progress("unpacking", count_segmentation(place)) as advance:
            return extract(place, self.out / "segmentation", advance)

    # -------------------------------------------------------------------------------------------------------- texts

    @cached_property
    def templates(self) -> tuple[tuple[str, ...], str]:
        """The templates and where they are from.

        Raises:
            InputError: a set that does not exist, or a template without ``{}``.
        """
        if not self.options.templates:
            return imagenet_templates(), OPEN_CLIP
        read = [template for name in self.options.templates for template in read_templates(name)]
        return tuple(dict.fromkeys(read)), ", ".join(self.options.templates)

    def classes(self, name: str) -> Named:
        """The classes of a data set with their texts.

        Names are those of ``--class-names``, where it has this data set's labels; else open_clip's for ImageNet's 1,000
        classes; else the first name of each class in the data set's own files.

        Raises:
            InputError: classes without names, or fewer than two.
        """
        benchmark = self.benchmark(name)
        labels = sorted({*benchmark.labels, *benchmark.names})
        given = {} if self.options.class_names is None else read_class_texts(self.options.class_names)
        if any(label in given for label in labels):
            lacking = [label for label in benchmark.labels if label not in given]
            if lacking:
                raise InputError(f"{self.options.class_names} has no text for {lacking[0]!r} of {benchmark.name}")
            names, source = {label: given[label] for label in labels if label in given}, str(self.options.class_names)
        elif name == "imagenet" and len(labels) == _CLASSES:
            names, source = {label: [each] for label, each in zip(labels, imagenet_names(), strict=True)}, OPEN_CLIP
        elif benchmark.names:
            names, source = {label: [benchmark.names[label][0]] for label in labels}, OWN
        else:
            raise InputError(
                f"no names of the {len(labels)} classes of {benchmark.name}: give --class-names FILE with columns "
                "label and text, or put LOC_synset_mapping.txt beside the images"
            )
        if len(names) < 2:
            raise InputError(
                f"{benchmark.name} has one class here, {labels[0]!r}: zero-shot accuracy needs two or more"
            )
        return Named(Classes.of(names, self.templates[0]), source)

    def classes_of_segmentation(self) -> Named:
        """The classes that images with masks are taken for: of ``--imagenet``, of ``--class-names``, or ImageNet's.

        Raises:
            InputError: as :meth:`classes`.
        """
        if self.options.data.imagenet is not None:
            return self.classes("imagenet")
        if self.options.class_names is not None:
            names = read_class_texts(self.options.class_names)
            return Named(Classes.of(names, self.templates[0]), str(self.options.class_names))
        numbered = {f"{number:04d}": [name] for number, name in enumerate(imagenet_names())}
        return Named(Classes.of(numbered, self.templates[0]), OPEN_CLIP)

    def write_classes(self, named: Named) -> Path:
        """Writes the texts of classes as ``--classes`` of other commands reads them."""
        path = self.out / "tables" / "classes.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs = zip(named.classes.labels, named.classes.texts, strict=True)
        write_csv(path, ("label", "text"), [(label, text) for label, some in pairs for text in some])
        return path

    def pool(self, name: str) -> list[str]:
        """The texts of a pool that the model can read; none for random vectors.

        Raises:
            InputError: no such pool, or a model without a tokenizer.
        """
        if name not in self._pools:
            texts, notes = read_pool(name)
            for note in notes:
                console.warn(note)
            self._pools[name] = fitting(self.model, texts, name) if texts else []
        return self._pools[name]

    # --------------------------------------------------------------------------------------------------------- keys

    def setup(self, name: str) -> dict[str, Any]:
        """What has to be as published for numbers of a data set with labels to be comparable."""
        named = self.classes(name)
        return {
            "images": self.collection(name).count,
            "classes": len(named.classes.labels),
            "class names": named.source,
            "templates": self.templates[1],
        }

    def key(self, table: str) -> Mapping[str, Any]:
        """Everything that a table depends on; raises as :meth:`benchmark` and :meth:`classes`."""
        options, model, data = self.options, self.model, TABLES[table].data
        key: dict[str, Any] = {
            "table": table,
            "weights": model.fingerprint(),
            "name": self.name,
            "dtype": str(model.dtype),
            "image_size": list(model.image_size),
            "templates": self.templates[0],
            "naming": [options.naming, read_pool(options.naming.pool)[0]],
            "sizes": [options.size, options.longest],
            "texts": [options.pools, options.words],
            "choices": [options.remove, options.attribute, options.methods],
            "store_dtype": options.store_dtype,
        }
        if data == "segmentation":
            place = find_segmentation(options.data.place(data) or Path())
            seen = sorted(place.rglob("*")) if place.is_dir() else [place]
            files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in seen]
            return key | {"files": files, "classes": self.classes_of_segmentation().classes.texts}
        images = [(str(image.path), image.label, image.group) for image in self.benchmark(data).images]
        classes = self.classes(data).classes.texts if TABLES[table].classes else None
        named = None if options.data.imagenet is None else str(options.data.imagenet)
        return key | {"images": images, "classes": classes, "named from": named}
