"""Settings: files whose errors name file, table and key, and dataclasses that check their own fields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ccu_fast import check
from ccu_fast.runs.settings import from_table, read_toml, with_known_keys


@dataclass(frozen=True)
class Config:
    count: int = check.field(3, "How many.", low=1, high=9)
    share: float = check.field(0.5, low=0, high=1)
    kind: str = check.field("a", allowed=("a", "b"))
    name: str | None = None
    flag: bool = False
    rest: tuple[str, ...] = check.field(("*",))

    def __post_init__(self) -> None:
        check.fields(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count: expected an int in [1, 9], got 0"),
        ({"count": 2.0}, "count: expected an int, got float"),
        ({"share": 1.5}, "share: expected a finite number in [0, 1], got 1.5"),
        ({"share": "much"}, "share: expected a number, got str"),
        ({"kind": "c"}, "kind: expected one of ('a', 'b'), got 'c'"),
        ({"name": 3}, "name: expected text, got 3"),
        ({"flag": 1}, "flag: expected True or False, got int"),
    ],
)
def test_fields_are_checked_by_their_type_and_bounds(values: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        Config(**values)
    assert str(caught.value) == message
    with pytest.raises(ValueError) as told:
        from_table(Config, values, "settings [part]", Path("run.toml"))
    assert str(told.value) == f"settings [part] {message} (in run.toml)"


def test_what_fits_is_taken_as_it_is() -> None:
    assert Config(count=9, share=1, name="x", flag=True, rest=("y",)) == Config(9, 1, "a", "x", True, ("y",))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(ValueError, match=r"config: expected a TOML file, got .*run.toml, which is not there"):
        read_toml(path, "config")
    path.write_text("a = \n")
    with pytest.raises(ValueError, match=r"config: expected TOML in .*run.toml, got "):
        read_toml(path, "config")
    path.write_text("skip-bad = true\n[part]\ncount = 4\n")
    read = with_known_keys(read_toml(path, "config"), ("skip_bad", "part"), "config", path)
    assert read == {"skip_bad": True, "part": {"count": 4}}
    with pytest.raises(ValueError, match=r"config \[part\]: expected one of \('counts',\) in .*run.toml, got 'count'"):
        with_known_keys(read["part"], ("counts",), "config [part]", path)
