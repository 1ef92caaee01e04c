"""A plan on disk that was damaged is not worked through."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from clipfast import InputError
from clipfast.dataset.plan import FILES, UNITS, Plan, Unit, write_plan
from clipfast.dataset.samples import Sample


@dataclass(frozen=True)
class Listed:
    """An input of files and shards that nobody reads."""

    name: str = "listed"
    last: str = "/b/2.tar"

    def units(self, size: int) -> Iterator[Unit]:
        for number in range(4):
            yield Unit("files", "/a", 5 * number, 5 * number + 5, files=tuple(f"/a/{number}-{n}.png" for n in range(5)))
        yield Unit("list", "/a.txt", 0, 9, version="17")
        yield Unit("shard", "/b/1.tar", size=17, version="18", folder="/b")
        yield Unit("shard", self.last, size=170, version="19", folder="/b")

    def read(self, unit: Unit) -> Iterator[Sample]:
        raise NotImplementedError

    names = read


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return write_plan(tmp_path, [Listed()], 5)


def test_a_whole_plan_is_what_it_was_made_of(plan: Plan) -> None:
    plan.check()
    made = list(Listed().units(5))
    assert [replace(unit, number=-1) for unit in plan.units()] == made


@pytest.mark.parametrize("name", [UNITS, FILES])
def test_a_flipped_bit_is_an_error_or_without_a_meaning(plan: Plan, name: str) -> None:
    units = list(plan.units())
    path = plan.folder / name
    content = path.read_bytes()
    generator, messages = random.Random(11), []
    for _ in range(150):
        place = generator.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :])
        try:
            plan.check()
        except InputError as error:
            messages.append(str(error))
        else:
            assert list(plan.units()) == units
    assert len(messages) > 50
    assert all(str(plan.folder) in message and "\n" not in message for message in messages)


def test_another_plan(plan: Plan, tmp_path: Path) -> None:
    other = write_plan(tmp_path, [Listed(last="/b/3.tar")], 5)
    other.check()
    with pytest.raises(InputError, match=r"units\.parquet or files\.parquet is damaged: they are not what the pass"):
        plan.check()
