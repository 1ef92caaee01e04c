"""The comparison of two result files."""

from typing import Any

from documents import entry, failure, result

from clipfast.bench.compare import differences, in_both, markdown


def compared(a: dict[str, Any], b: dict[str, Any]) -> str:
    return markdown(a, b, ("old.json", "new.json"))


def test_matching_cases_have_the_ratio_of_b_over_a() -> None:
    a = result(entry("plain", speed=10.0), entry("heads", speed=20.0))
    b = result(entry("heads", speed=30.0, memory={"shown_mb": 1200.0, "of": "process"}), entry("plain", speed=10.0))
    lines = [line for line in compared(a, b).splitlines() if line.startswith("|")]
    assert lines[2:] == [
        "| ViT-B-32, batch 8, fp32, auto: plain | 10 | 10 | 1.000 | 1.50 GB | 1.50 GB | 1.000 |",
        "| ViT-B-32, batch 8, fp32, auto: heads | 20 | 30 | 1.500 | 1.50 GB | 1.20 GB | 0.800 |",
    ]
    assert "- same machine, versions, settings and commit" in compared(a, b)
    assert "only in" not in compared(a, b)


def test_cases_match_only_with_equal_settings() -> None:
    a = result(entry())
    for other in ({"model": "ViT-B-16"}, {"batch": 4}, {"dtype": "bf16"}, {"backend": "eager"}, {"output": "maps"}):
        assert in_both(a, result(entry(**other))) == []
    assert len(in_both(a, result(entry()))) == 1


def test_cases_of_only_one_file_are_listed() -> None:
    lines = compared(result(entry("heads"), entry("maps")), result(entry("heads"), entry("tokens"))).splitlines()
    assert "- only in A: ViT-B-32, batch 8, fp32, auto: maps" in lines
    assert "- only in B: ViT-B-32, batch 8, fp32, auto: tokens" in lines


def test_failed_cases_are_listed_with_their_reason() -> None:
    lines = compared(result(entry("maps")), result(failure("maps"))).splitlines()
    assert "- not measured in B: ViT-B-32, batch 8, fp32, auto: maps (out of memory: try a smaller --batch)" in lines
    alone = compared(result(), result(failure("maps"))).splitlines()
    assert any(line.startswith("- only in B:") and "not measured: out of memory" in line for line in alone)


def test_other_differences_are_listed() -> None:
    a = result(entry())
    other = {"device": "cuda", "device_name": "NVIDIA H200", "cores": 16}
    settings = {"pairs": 3, "texts": 32, "threads": 2, "device": "cpu"}
    b = result(
        entry(),
        machine=other,
        versions={"python": "3.11.7", "torch": "2.15.0", "triton": "4"},
        settings=settings,
        code={"commit": None, "dirty": None},
        complete=False,
    )
    assert differences(a, b) == [
        "machine device: cpu in A, cuda in B",
        "machine device_name: AMD EPYC in A, NVIDIA H200 in B",
        "machine cores: 2 in A, 16 in B",
        "version torch: 2.14.1 in A, 2.15.0 in B",
        "version triton: None in A, 4 in B",
        "setting texts: 16 in A, 32 in B",
        "commit: 0123456789 in A, none in B",
    ]
    assert "- B was interrupted" in compared(a, b)
    assert differences(a, a) == []


def test_local_changes_count_as_a_difference() -> None:
    dirty = result(entry(), code={"commit": "0123456789abcdef", "dirty": True})
    assert differences(result(entry()), dirty) == ["commit: 0123456789 in A, 0123456789 with local changes in B"]


def test_process_memory_is_not_compared_with_device_memory() -> None:
    (line,) = compared(result(entry()), result(entry(memory={"shown_mb": 750.0, "of": "device"}))).splitlines()[-1:]
    assert line.endswith("| 1.50 GB | 750 MB |  |")
    (line,) = compared(result(entry()), result(entry(memory=None))).splitlines()[-1:]
    assert line.endswith("| 1.50 GB |  |  |")
