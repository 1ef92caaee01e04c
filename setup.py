"""Build script: metadata lives in pyproject.toml, only the folder mapping is here.

The kernels stand at the top of the repository, beside ``csrc``-style sources and away from the Python layer that
calls them, and are installed as ``clipfast.kernels``. The committed link ``clipfast/kernels -> ../kernels`` shows the
same folder to type checkers and to runs from the checkout.
"""

from setuptools import find_packages, setup

setup(
    packages=["clipfast.kernels", *(p for p in find_packages(include=["clipfast*"]) if p != "clipfast.kernels")],
    package_dir={"clipfast.kernels": "kernels"},
)
