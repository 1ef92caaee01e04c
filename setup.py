"""Build script: metadata lives in pyproject.toml; here are the folder mapping and the libraries in C++ and CUDA.

The kernels stand at the top of the repository, beside ``csrc`` and away from the Python layer that calls them, and are
installed as ``clipfast.kernels``. The committed link ``clipfast/kernels -> ../kernels`` shows the same folder to type
checkers and to runs from the checkout.

``csrc`` becomes ``clipfast/kernels/_native.so``, a shared library of C functions: it needs a C++ compiler and neither
torch nor Python to be built, so it builds in pip's isolated environment, and one wheel serves every Python and torch.
``csrc/cuda`` becomes ``_cuda.so`` in the same way where there is ``nvcc`` (in ``CUDA_HOME`` or on the ``PATH``), with
or without a GPU; ``CLIPFAST_CUDA=1`` asks for it, ``CLIPFAST_CUDA=0`` leaves it out. Both are optional: where one
cannot be built everything else is installed, with the reason in ``_native_failed.txt`` or ``_cuda_failed.txt`` for
``clipfast doctor``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")

NATIVE = Extension(
    "clipfast.kernels._native",
    sources=sorted(map(str, CSRC.glob("*.cpp"))),
    depends=sorted(map(str, CSRC.glob("*.h"))),
    language="c++",
    extra_compile_args=["-std=gnu++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-fno-math-errno", "-g0"],
    optional=True,
)
CUDA = Extension(
    "clipfast.kernels._cuda",
    sources=sorted(map(str, CSRC.glob("cuda/*.cu"))),
    depends=sorted(map(str, CSRC.glob("cuda/*.h"))),
    # For Hopper alone, as kernels/cuda.py says. CUDA's runtime is linked in; the driver is looked for when it runs.
    extra_compile_args=["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-cudart=static"],
    optional=True,
)


def find_nvcc() -> str | None:
    """The compiler that CUDA_HOME or CUDA_PATH names, else the one on the PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc")


class Build(build_ext):
    """Builds the libraries under names of their own; where that fails, writes down why and goes on."""

    def get_ext_filename(self, fullname: str) -> str:
        """Its name does not speak of a Python that it does not use."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Never raises: the reason stands beside the place where the library would be."""
        library, failure = self.results(ext)
        library.parent.mkdir(parents=True, exist_ok=True)
        failure.unlink(missing_ok=True)
        try:
            if sys.platform == "win32":
                raise OSError("csrc/ is written for GCC and clang")
            if ext.name == CUDA.name:
                self.build_cuda(ext, library)
            else:
                super().build_extension(ext)
        except Exception as error:  # compilers fail in their own ways
            library.unlink(missing_ok=True)
            failure.write_text(f"{' '.join(str(error).split())} (pip install -v shows more)\n", encoding="utf-8")

    def build_cuda(self, ext: Extension, library: Path) -> None:
        """Nothing where nvcc is neither there nor asked for."""
        library.unlink(missing_ok=True)
        wanted, nvcc = os.environ.get("CLIPFAST_CUDA", ""), find_nvcc()
        if wanted not in ("", "0", "1"):
            raise OSError(f"CLIPFAST_CUDA is {wanted!r}: expected 0 or 1")
        if wanted == "0" or not (wanted or nvcc):
            return
        if nvcc is None:
            raise OSError("CLIPFAST_CUDA=1 asks for it, and nvcc is neither in CUDA_HOME nor on the PATH")
        host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
        shared = ["-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-o", str(library)]
        command = [nvcc, *host, *ext.extra_compile_args, *shared, *ext.sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout + done.stderr, end="", file=sys.stderr)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
            raise OSError(f"nvcc failed: {said[0] if said else f'it ended with {done.returncode}'}")

    def results(self, ext: Extension) -> tuple[Path, Path]:
        """Where the library comes to stand, and the reason why there is none."""
        library = Path(self.build_lib, self.get_ext_filename(ext.name))
        return library, library.with_name(f"{library.stem}_failed.txt")

    def copy_extensions_to_source(self) -> None:
        """An editable install finds what was built in ``kernels``."""
        super().copy_extensions_to_source()
        for built in (path for ext in self.extensions for path in self.results(ext)):
            Path("kernels", built.name).unlink(missing_ok=True)
            if built.exists():
                shutil.copyfile(built, Path("kernels", built.name))


class Wheel(bdist_wheel):
    """A wheel for one platform and any Python: what is compiled in it does not use Python."""

    def finalize_options(self) -> None:
        """It is not the same everywhere."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """No Python and no ABI."""
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["clipfast*"], exclude=["clipfast.kernels*"]),  # without what the link leads to
        "clipfast.kernels",
        *(f"clipfast.kernels.{folder}" for folder in find_packages("kernels")),
    ],
    package_dir={"clipfast.kernels": "kernels"},
    ext_modules=[NATIVE, CUDA],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
