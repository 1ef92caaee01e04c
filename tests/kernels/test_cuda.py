"""The contract under the library in CUDA, on a GPU that it is compiled for."""

import pytest
import torch
from contract_heads import SpanContract
from contracting import DEVICES, draw, in_double

from clipfast.kernels import cuda, dispatch, reference
from clipfast.kernels.span import cuda as span_cuda

HERE = pytest.mark.skipif(bool(cuda.unsupported_reasons()), reason="; ".join(cuda.unsupported_reasons()))


class TestCuda(SpanContract):
    """Of its one operation; all others are eager's."""

    backend = "cuda"
    device = DEVICES.get("cuda", "cpu")


def test_it_has_no_other_operation() -> None:
    assert {*span_cuda.IMPLEMENTATIONS} == {"span"}


@HERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_of_blocks_picks_the_same(dtype: torch.dtype) -> None:
    texts, factor = draw(0, 3, 3500, 67).to(dtype), draw(1, 3, 67, 67).double() * 0.95 ** torch.arange(67)
    expected = reference.span(*in_double(texts, factor), 60, 1e-10)[0].tolist()
    on_gpu = texts.cuda(), factor.cuda()
    result = cuda.clusters(torch.cuda.current_device(), dtype, 3500, 67)
    assert result
    for blocks in result:
        first = span_cuda.span(*on_gpu, 60, 1e-10, blocks)
        assert first[0].tolist() == expected
        for _ in range(20):  # a race would not lose every time
            for have, one in zip(span_cuda.span(*on_gpu, 60, 1e-10, blocks), first, strict=True):
                assert torch.equal(have, one)


@HERE
def test_auto_considers_it() -> None:
    texts, factor = draw(0, 2, 500, 20).cuda(), draw(1, 2, 20, 20).cuda()
    able, _ = dispatch.candidates("span", [texts, factor, 5, 1e-10])
    assert able[0].name == "cuda"


@HERE
def test_it_computes_on_the_current_stream() -> None:
    """What it reads is written by work that was queued there before."""
    texts, factor = draw(0, 2, 3000, 40).cuda(), draw(1, 2, 40, 40).cuda()
    expected = span_cuda.span(texts, factor, 20, 1e-10)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = texts.flip(1).flip(1)
        have = span_cuda.span(late, factor, 20, 1e-10)[0]
    stream.synchronize()
    assert torch.equal(have, expected)
