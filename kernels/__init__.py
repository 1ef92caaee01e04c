"""The operations clipfast's speed rests on: one definition each, several backends.

Installed as ``clipfast.kernels``. Nothing else of clipfast is imported here, so the operations can be used on their
own tensors by anyone.

* :mod:`clipfast.kernels.reference` defines every operation plainly, in whatever precision its inputs have.
* Every other folder is a family of operations: its ``__init__.py`` has the public calls, each other file a backend.
* :mod:`clipfast.kernels.ops` has all public calls under one name.
* :mod:`clipfast.kernels.dispatch` chooses the backend that computes a call.
"""

if __name__ != "clipfast.kernels":
    # A top-level package called `kernels` exists on PyPI and transformers looks for it: never stand in for it.
    raise ImportError(
        f"this folder is the package clipfast.kernels and was imported as {__name__!r}: "
        "install clipfast and write `import clipfast.kernels`"
    )
