"""Options of ``clipfast doctor``."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from cyclopts import Parameter

from clipfast.commands.options import Dtype, Flag, Paths
from clipfast.errors import InputError


@dataclass(frozen=True)
class Options:
    """Say what this installation has, or test a model on this device.

    Without a model: versions, processor, devices, backends, the bundled model. With one: does it decompose correctly
    here? The sum of its terms, its own embedding, maps and scores are compared, on drawn images; the exit code is 1
    where two of them differ.

    Attributes:
        model: A model to test, as for ``clipfast decompose --model``.
        images: Images to test it on, too: image files, folders, tar shards.
        pretrained: A tag of open_clip, or a checkpoint's path.
        device: cpu, cuda, cuda:N or mps. Default: CUDA where there is a device.
        dtype: Precision of the weights. Default: fp32.
        image_size: Height and width of its input in pixels, such as 336x672, or one side. Default: the model's own.
        backend: Kernels to test: auto, or a backend's name.
        json: Print JSON instead of the table.
    """

    model: Annotated[str | None, Parameter(name="MODEL")] = None
    images: Paths = ()
    _: KW_ONLY
    pretrained: str | None = None
    device: str | None = None
    dtype: Dtype | None = None
    image_size: str | None = None
    backend: str = "auto"
    json: Flag = False

    def check(self) -> None:
        """Checks what can be checked before anything is read.

        Raises:
            InputError: an option that tests a model, and no model.
        """
        needs_model = {"--pretrained": self.pretrained, "--device": self.device, "--dtype": self.dtype}
        needs_model["--image-size"] = self.image_size
        given = [option for option, value in needs_model.items() if value is not None]
        given += ["--backend"] if self.backend != "auto" else []
        if self.model is None and given:
            raise InputError(f"{given[0]} is for testing a model: name it, as in `clipfast doctor scenes {given[0]} …`")
