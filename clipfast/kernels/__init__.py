"""The operations clipfast's speed rests on: one definition each, several backends.

Nothing else of clipfast is imported here, so the operations can be used on their
own tensors by anyone.

* :mod:`clipfast.kernels.reference` defines every operation plainly, in whatever precision its inputs have.
* Every other folder is a family of operations: its ``__init__.py`` has the public calls, each other file a backend.
* :mod:`clipfast.kernels.ops` has all public calls under one name.
* :mod:`clipfast.kernels.dispatch` chooses the backend that computes a call.
"""
