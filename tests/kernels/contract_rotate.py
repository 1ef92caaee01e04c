"""Rotary positions: the definition in float64 is the truth."""

import pytest
import torch
from contracting import HEADS, IMAGES, LOW, Contract, floor
from measures import error, relative_error
from tolerances import FLOAT64, LOW_PRECISION_FACTOR, OP_FLOAT32
from torch import Tensor

from clipfast.kernels import ops, reference

EITHER_PAIRS = pytest.mark.parametrize("halves", [True, False], ids=["halves", "neighbours"])
CASES = [(1, 64), (2, 2), (17, 16), (17, 64), (50, 88), (5, 34), (5, 72), (5, 80), (5, 112), (3, 128)]


class RotateContract(Contract):
    """``rotate``."""

    def draw_rotary(
        self, tokens: int, head_dim: int, tables: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Packed queries, keys and values, cosines and sines: of angles that differ between the entries of a pair."""
        angles = self.draw(1, tables, tokens, head_dim)
        return self.draw(0, IMAGES, tokens + 1, 3, HEADS, head_dim, dtype=dtype), angles.cos(), angles.sin()

    @EITHER_PAIRS
    @pytest.mark.parametrize("tables", [1, HEADS])
    @pytest.mark.parametrize(("tokens", "head_dim"), CASES)
    def test_rotate(self, tokens: int, head_dim: int, tables: int, halves: bool) -> None:
        """Queries and keys of all tokens but the first; nothing else is changed."""
        qkv, cos, sin = self.draw_rotary(tokens, head_dim, tables)
        before = qkv.clone()
        assert ops.rotate(qkv[:, 1:, :2], cos, sin, halves, backend=self.backend) is None
        expected = before.double()
        expected[:, 1:, :2] = reference.rotate(expected[:, 1:, :2], cos.double(), sin.double(), halves)
        assert relative_error(qkv, expected) <= OP_FLOAT32
        assert torch.equal(qkv[:, 0], before[:, 0])
        assert torch.equal(qkv[:, :, 2], before[:, :, 2])

    @EITHER_PAIRS
    @pytest.mark.parametrize("dtype", LOW)
    def test_rotate_in_low_precision(self, dtype: torch.dtype, halves: bool) -> None:
        """Rounded once, with angles of any precision."""
        qkv, cos, sin = self.draw_rotary(17, 64, 1, dtype)
        for tables in ((cos, sin), (cos.to(dtype), sin.to(dtype))):
            x = qkv.clone()
            ops.rotate(x, *(table.repeat(1, 2, 1)[:, :18] for table in tables), halves, backend=self.backend)
            exact, plain = (
                reference.rotate(qkv.to(kind), *(table.to(kind).repeat(1, 2, 1)[:, :18] for table in tables), halves)
                for kind in (torch.float64, torch.float32)
            )
            assert x.dtype == dtype
            assert error(x, exact) <= LOW_PRECISION_FACTOR * error(plain.to(dtype), exact) + floor(exact)

    @EITHER_PAIRS
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1), (2, 1, 0, 3), (1, 3, 2, 0)])
    def test_rotate_of_any_strides(self, order: tuple[int, ...], halves: bool) -> None:
        """The last axis is contiguous, the others lie in memory in any order, with gaps; tables with gaps."""
        qkv, cos, sin = self.draw_rotary(17, 16, HEADS)
        contiguous = qkv[:, 1:].contiguous()
        shape = [contiguous.shape[axis] for axis in order]
        wide = contiguous.new_full([*shape, 24], torch.nan)
        wide[..., 3:19] = contiguous.permute(*order, 4)
        x = wide[..., 3:19].permute([*(order.index(axis) for axis in range(4)), 4])
        assert torch.equal(x, contiguous)
        tables = [table.permute(2, 0, 1).contiguous().permute(1, 2, 0) for table in (cos, sin)]
        ops.rotate(x, *tables, halves, backend=self.backend)
        expected = reference.rotate(contiguous.double(), cos.double(), sin.double(), halves)
        assert relative_error(x, expected) <= OP_FLOAT32
        assert wide[..., :3].isnan().all()
        assert wide[..., 19:].isnan().all()

    @EITHER_PAIRS
    def test_rotate_in_float64(self, halves: bool) -> None:
        qkv, cos, sin = (tensor.double() for tensor in self.draw_rotary(17, 64, 1))
        x = qkv[:, 1:].clone()
        if not self.takes_float64("rotate"):
            with self.refuses_float64():
                ops.rotate(x, cos, sin, halves, backend=self.backend)
            return
        ops.rotate(x, cos, sin, halves, backend=self.backend)
        assert relative_error(x, reference.rotate(qkv[:, 1:], cos, sin, halves)) <= FLOAT64

    @EITHER_PAIRS
    def test_rotate_of_nothing(self, halves: bool) -> None:
        qkv, cos, sin = self.draw_rotary(17, 64, 1)
        before = qkv.clone()
        ops.rotate(qkv[:0, 1:], cos, sin, halves, backend=self.backend)
        ops.rotate(qkv[:, :0], cos[:, :0], sin[:, :0], halves, backend=self.backend)
        ops.rotate(qkv[:, 1:, :0], cos, sin, halves, backend=self.backend)
        assert torch.equal(qkv, before)
