"""Build script: metadata lives in pyproject.toml; here are the libraries in C++ and CUDA.

``csrc`` becomes the extension module ``clipfast.kernels._native``, bound with pybind11: it needs a C++ compiler and no
torch to be built, so it builds in pip's isolated environment. ``csrc/cuda`` becomes ``_cuda.so``, a shared library of
C functions, where there is ``nvcc`` (in ``CUDA_HOME`` or on the ``PATH``), with or without a GPU; ``CLIPFAST_CUDA=1``
asks for it, ``CLIPFAST_CUDA=0`` leaves it out. Both are optional: where one cannot be built everything else is
installed, with the reason in ``_native_failed.txt`` or ``_cuda_failed.txt`` for ``clipfast doctor``. A JSON file beside
each library records its size and digest, which are checked before it is loaded (``clipfast/kernels/manifest.py``).
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
KERNELS = Path("clipfast", "kernels")
MANIFEST = runpy.run_path(str(KERNELS / "manifest.py"))  # importing clipfast.kernels would need torch

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
    """Builds the libraries; where that fails, writes down why and goes on."""

    def get_ext_filename(self, fullname: str) -> str:
        """The CUDA library is not a Python module: its name contains no Python version."""
        if fullname == CUDA.name:
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        """Never raises: the reason stands beside the place where the library would be."""
        library, record, failure = self.results(ext)
        library.parent.mkdir(parents=True, exist_ok=True)
        failure.unlink(missing_ok=True)
        record.unlink(missing_ok=True)
        try:
            if sys.platform == "win32":
                raise OSError("csrc/ is written for GCC and clang")
            if ext.name == CUDA.name:
                self.build_cuda(ext, library)
            else:
                self.build_native(ext)
            if library.exists():
                MANIFEST["write"](library, CSRC / "cuda" if ext.name == CUDA.name else CSRC)
        except Exception as error:  # compilers fail in their own ways
            library.unlink(missing_ok=True)
            failure.write_text(f"{' '.join(str(error).split())} (pip install -v shows more)\n", encoding="utf-8")

    def build_native(self, ext: Extension) -> None:
        """With pybind11's headers."""
        try:
            import pybind11
        except ImportError:
            raise OSError("pybind11 is not installed") from None
        ext.include_dirs = [pybind11.get_include()]
        super().build_extension(ext)

    def build_cuda(self, ext: Extension, library: Path) -> None:
        """Builds nothing where there is no nvcc, unless CLIPFAST_CUDA=1 asks for it."""
        library.unlink(missing_ok=True)
        setting, nvcc = os.environ.get("CLIPFAST_CUDA", ""), find_nvcc()
        if setting not in ("", "0", "1"):
            raise OSError(f"CLIPFAST_CUDA is {setting!r}: expected 0 or 1")
        if setting == "0" or not (setting or nvcc):
            return
        if nvcc is None:
            raise OSError("CLIPFAST_CUDA=1 asks for it, and nvcc is neither in CUDA_HOME nor on the PATH")
        host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
        shared = ["-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-o", str(library)]
        command = [nvcc, *host, *ext.extra_compile_args, *shared, *ext.sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout + done.stderr, end="", file=sys.stderr)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
            raise OSError(f"nvcc failed: {errors[0] if errors else f'it ended with {done.returncode}'}")

    def results(self, ext: Extension) -> tuple[Path, Path, Path]:
        """Where the library comes to stand, its record, and the reason why there is none."""
        library = Path(self.build_lib, self.get_ext_filename(ext.name))
        name = ext.name.rpartition(".")[2]
        return library, MANIFEST["path_for"](library), library.with_name(f"{name}_failed.txt")

    def copy_extensions_to_source(self) -> None:
        """An editable install finds what was built in ``clipfast/kernels``."""
        super().copy_extensions_to_source()
        for built in (path for ext in self.extensions for path in self.results(ext)):
            (KERNELS / built.name).unlink(missing_ok=True)
            if built.exists():
                shutil.copyfile(built, (KERNELS / built.name))


setup(
    packages=find_packages(include=["clipfast*"]),
    ext_modules=[NATIVE, CUDA],
    cmdclass={"build_ext": Build},
)
