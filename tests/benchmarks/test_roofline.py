"""The roofline model: known figures, monotonicity, the table and its command line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import roofline
from benchmarks.costs import Batch, Shape, Step, moved, plain_eager, plain_fused, products
from benchmarks.costs_decomposed import Options, decomposed, plain_same_kernels

TINY = Batch(Shape(grid=(3, 3), patch=(8, 8), layers=3, width=32, heads=2, hidden=96, embed_dim=20), images=2)

# -------------------------------------------------------------------------------------------------------- known figures


@pytest.mark.parametrize(
    ("name", "gflop", "naive"),
    [
        ("ViT-B-32", 8.82, 0.092),
        ("ViT-B-16", 35.1, 1.43),
        ("ViT-L-14", 162, 4.33),
        ("ViT-L-14-336", 382, 21.8),
        ("ViT-H-14", 335, 5.41),
        ("ViT-bigG-14", 968, 7.03),
    ],
)
def test_known_figures(name: str, gflop: float, naive: float) -> None:
    estimate = roofline.estimate(Batch(roofline.shape_of(name), images=256), roofline.DEVICES["h200"])
    assert estimate.gflop("plain_eager") == pytest.approx(gflop, rel=2e-3)
    assert estimate.naive_bytes / 1e9 == pytest.approx(naive, rel=5e-3)
    # The last block is one of L blocks; a single row of it costs almost nothing.
    saved = estimate.saved_by_last_block * estimate.shape.layers
    assert 0.93 < saved < 1
    assert estimate.against("heads", "plain_same_kernels") < 1 - estimate.saved_by_last_block / 2
    assert estimate.against("heads", "plain_eager") < estimate.against("heads", "plain_same_kernels") < 1


def test_cost_grows_with_every_size() -> None:
    changes: list[dict[str, Any]] = [{"layers": 4}, {"width": 64}, {"hidden": 97}, {"grid": (3, 4)}, {"embed_dim": 21}]
    bigger = [replace(TINY, images=3), *(replace(TINY, shape=replace(TINY.shape, **change)) for change in changes)]
    for forward in (plain_eager, plain_fused, plain_same_kernels, decomposed):
        for more in bigger:
            assert products(forward(more)) > products(forward(TINY))
            assert moved(forward(more)) > moved(forward(TINY))
        twice = replace(TINY, images=4)
        assert products(forward(twice)) == 2 * products(forward(TINY))
        assert moved(forward(twice)) < 2 * moved(forward(TINY))  # weights are read once per batch
        assert moved(forward(TINY)) < moved(forward(replace(TINY, element=4))) <= 2 * moved(forward(TINY))
    assert moved(plain_fused(TINY)) < moved(plain_same_kernels(TINY)) < moved(plain_eager(TINY))
    options = [Options(), Options(alpha=True), Options(alpha=True, texts=2), Options(alpha=True, texts=9)]
    costs = [moved(decomposed(TINY, option)) for option in (*options, replace(options[-1], tokens=True))]
    assert costs == sorted(set(costs))


def test_time_is_the_larger_of_arithmetic_and_memory() -> None:
    device = roofline.Device("?", matrix=100, bandwidth=10, float32=20, origin="?", efficiency=0.5, attention=0.25)
    assert device.seconds(Step("moving", products=50, read=20, written=10)) == 3
    assert device.seconds(Step("computing", products=150, pointwise=25, padding=25, read=20)) == 4
    assert device.seconds(Step("attention", products=100, read=20, unit="attention")) == 4
    assert device.seconds(Step("float32", products=100, read=20, unit="float32")) == 10
    slow = roofline.estimate(TINY, device)
    for change in ({"matrix": 200}, {"bandwidth": 20}, {"efficiency": 1.0}):
        fast = roofline.estimate(TINY, replace(device, **change))
        assert all(fast.costs[name].seconds <= slow.costs[name].seconds for name in slow.costs)
        assert any(fast.costs[name].seconds < slow.costs[name].seconds for name in slow.costs)


# -------------------------------------------------------------------------------------------------------- command line


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "roofline.json"
    roofline.main(["--models", "ViT-[BL]-*", "--json", str(path), "--last", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("**Modelled, not measured**: H200 at 790 TFLOP/s")
    assert lines[0].endswith("batch 256, bfloat16, 100 texts, the last 4 layers kept.")
    assert len({line.count("|") for line in lines[2:]}) == 1
    (large,) = [line for line in lines if line.startswith(("| ViT-L-14 and", "| ViT-L-14 |"))]
    assert "| 257 | 162, 156 |" in large
    assert "122880 ÷ 65536 = 1.88" in large
    document = json.loads(path.read_text())
    assert (document["format"], document["modelled"], document["measured"]) == (roofline.FORMAT, True, False)
    assert len(document["models"]) == len(lines) - 4
    (b16,) = [model for model in document["models"] if "ViT-B-16" in model["names"]]
    assert b16["costs"]["plain_eager"]["flops"] == 256 * 35126906880


def test_options_set_device_and_rates(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--models", "ViT-B-32", "--device", "a100", "--dtype", "float32", "--batch", "8", "--texts", "1"])
    roofline.main(["--models", "ViT-B-32", "--peak", "600", "--bandwidth", "3", "--efficiency", "0.5"])
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("**"))
    assert "A100 at 19.5 TFLOP/s" in first
    assert "2 TB/s" in first
    assert "300 TFLOP/s (40% of 600 in attention) and 3 TB/s, rates as given" in second


def test_bars_are_compared_with_what_is_modelled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(roofline.shape_of("ViT-L-14"), images=256)
    faster = {
        (name, plain): 1 / roofline.estimate(batch, device).against("alpha", plain)
        for name, device in roofline.DEVICES.items()
        for plain in ("plain_eager", "plain_fused")
    }
    monkeypatch.setattr(
        roofline,
        "BARS",
        {
            ("h100", "plain_eager"): faster["h100", "plain_eager"] - 0.01,
            ("h200", "plain_fused"): faster["h200", "plain_fused"] + 0.01,
        },
    )
    roofline.main(["--bars"])
    out = capsys.readouterr().out
    assert out.startswith("**Modelled, not measured**: time of a plain forward / time of the decomposed one")
    rows = {
        line.split(" | ")[0].strip("| "): [cell.strip() for cell in line.split("|")[2:-1]] for line in out.splitlines()
    }
    assert {"H100", "H200", "B200", "A100"} < set(rows)
    for name, device in roofline.DEVICES.items():
        eager, _, fused, _ = rows[device.name]
        assert eager == f"{faster[name, 'plain_eager']:.3f}"
        assert fused == f"{faster[name, 'plain_fused']:.3f}"
    assert rows["H100"][1].endswith(" met")
    assert rows["H200"][3].endswith(" missed")
    assert rows["B200"][1] == ""
    assert all(f"- {assumption}" in out for assumption in roofline.ASSUMPTIONS)


def test_bars_are_met() -> None:
    batch = Batch(roofline.shape_of(roofline.BARRED), images=256)
    for (name, plain), least in roofline.BARS.items():
        assert roofline.estimate(batch, roofline.DEVICES[name]).against("alpha", plain) <= 1 / least


def test_gpus_are_alike_but_for_their_memory() -> None:
    h100, h200, b200 = (roofline.DEVICES[name] for name in ("h100", "h200", "b200"))
    assert (h100.matrix, h100.float32, h100.attention) == (h200.matrix, h200.float32, h200.attention)
    assert h100.bandwidth < h200.bandwidth < b200.bandwidth
    for device, rate, bandwidth in ((h100, 989e12, 3.35e12), (h200, 989e12, 4.8e12), (b200, 2250e12, 8e12)):
        assert device.matrix == pytest.approx(0.8 * rate, rel=5e-3)
        assert device.bandwidth == pytest.approx(0.9 * bandwidth, rel=6e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "convnext_large_d"], "no model that can be decomposed matches 'convnext_large_d'"),
        (["--batch", "0"], "'0' is not a whole number from 1"),
        (["--batch", "two"], "'two' is not a whole number from 1"),
        (["--texts", "1e9999"], "'1e9999' is not a whole number"),
        (["--peak", "nan"], "'nan' is not a number from"),
        (["--bandwidth", "inf"], "'inf' is not a number from"),
        (["--efficiency", "1.5"], "'1.5' is not a number from 1e-06 to 1"),
        (["--device", "abacus"], "invalid choice: 'abacus'"),
        (["--models", "ViT-B-32", "--json", "no/such/folder/x.json"], "cannot write no/such/folder/x.json"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        roofline.main(arguments)
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert message in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")
