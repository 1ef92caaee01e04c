"""Build script: metadata lives in pyproject.toml; here are the folder mapping and the library in C++.

The kernels stand at the top of the repository, beside ``csrc`` and away from the Python layer that calls them, and are
installed as ``clipfast.kernels``. The committed link ``clipfast/kernels -> ../kernels`` shows the same folder to type
checkers and to runs from the checkout.

``csrc`` becomes ``clipfast/kernels/_native.so``, a shared library of C functions: it needs a C++ compiler and neither
torch nor Python to be built, so it builds in pip's isolated environment, and one wheel serves every Python and torch.
It is optional: where it cannot be built everything else is installed, with the reason in ``_native_failed.txt`` for
``clipfast doctor``.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
FAILURE = "_native_failed.txt"

NATIVE = Extension(
    "clipfast.kernels._native",
    sources=sorted(map(str, CSRC.glob("*.cpp"))),
    depends=sorted(map(str, CSRC.glob("*.h"))),
    language="c++",
    extra_compile_args=["-std=gnu++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-fno-math-errno", "-g0"],
    optional=True,
)


class Build(build_ext):
    """Builds the library under a name of its own; where that fails, writes down why and goes on."""

    def get_ext_filename(self, fullname: str) -> str:
        """Its name does not speak of a Python that it does not use."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Never raises: the reason stands beside the place where the library would be."""
        library = Path(self.build_lib, self.get_ext_filename(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        failure = library.with_name(FAILURE)
        failure.unlink(missing_ok=True)
        try:
            if sys.platform == "win32":
                raise OSError("csrc/ is written for GCC and clang")
            super().build_extension(ext)
        except Exception as error:  # compilers fail in their own ways
            library.unlink(missing_ok=True)
            failure.write_text(f"{' '.join(str(error).split())} (pip install -v shows more)\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """An editable install finds both files in ``kernels``."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, self.get_ext_filename(NATIVE.name))
        for name in (built.name, FAILURE):
            Path("kernels", name).unlink(missing_ok=True)
            if built.with_name(name).exists():
                shutil.copyfile(built.with_name(name), Path("kernels", name))


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
    packages=["clipfast.kernels", *(p for p in find_packages(include=["clipfast*"]) if p != "clipfast.kernels")],
    package_dir={"clipfast.kernels": "kernels"},
    ext_modules=[NATIVE],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
