"""No kernel multiplies a stride in 32 bits unless its launch knows that the product fits."""

import os
import subprocess
import sys

import pytest
from builders import ROOT

from benchmarks import offsets

HEAD = "  tt.func public @k(%p_x: !tt.ptr<f32>, %s_part: i32, %s_n: i32, %N: i32) {"


def found(*body: str) -> list[frozenset[str]]:
    return [names for _, names in offsets.narrow_products("\n".join((HEAD, *body)))]


@pytest.mark.slow
def test_no_product_of_a_stride_may_overflow() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.offsets"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    assert lines[-1].endswith(", 0 with faults")
    # What is bounded is still there to be bounded.
    assert [tuple(line.split(":")[0].split()) for line in lines[:-1]] == sorted(offsets.BOUNDED)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (["    %a = arith.muli %s_part, %c2_i32 : i32 loc(#loc1)"], [{"s_part"}]),
        (["    %a = arith.shli %s_part, %c2_i32 : i32 loc(#loc1)"], [{"s_part"}]),
        (["    %a = arith.extsi %s_part : i32 to i64 loc(#l)", "    %b = arith.muli %a, %c2_i64 : i64 loc(#l)"], []),
        (
            [
                "    %a = tt.splat %s_n : i32 -> tensor<64x1xi32> loc(#l)",
                "    %b = arith.addi %a, %N_1 : tensor<64x1xi32> loc(#l)",
                "    %c = arith.muli %b, %o {tt.divisibility = dense<16> : tensor<1xi32>} : tensor<64x1xi32> loc(#l)",
            ],
            [{"s_n"}],
        ),
        (["    %a = arith.muli %N, %s_n : i32"], [{"N", "s_n"}]),
        (["    %a = arith.muli %c1, %c2 : i32"], []),
        (
            [
                "    %r:2 = scf.for %i = %c0 to %N step %c1 iter_args(%o = %s_n, %x = %c0) -> (i32, i32)  : i32 {",
                "      %a = arith.muli %o, %c2_i32 : i32 loc(#l)",
            ],
            [{"s_n"}],
        ),
        (["    %a = arith.remsi %N, %s_n : i32", "    %b = arith.muli %a, %c2 : i32"], []),
    ],
)
def test_products_of_32_bits_are_found(body: list[str], expected: list[set[str]]) -> None:
    assert found(*body) == expected


def test_the_compiler_knows_nothing_of_an_unknown_stride() -> None:
    assert offsets.UNKNOWN % 2
    assert offsets.UNKNOWN != 1
    assert offsets.UNKNOWN == 2**31 - 1  # the largest that is passed in 32 bits


def test_the_command_needs_the_compiler() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.offsets"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == "benchmarks.offsets: TRITON_INTERPRET is set: unset it to lower kernels\n"
