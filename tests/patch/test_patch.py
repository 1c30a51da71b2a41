"""The mechanics of ccu_fast.patch, on a module made here in place of a library."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
import torch

from ccu_fast import patch
from ccu_fast.patch.patch import Target
from ccu_fast.patch.site import Installed, Site, arguments


class Library:
    def forward(self, x: int, y: int = 1) -> int:
        return x + y


class Child(Library):
    pass


OWN = Library.forward


def doubled(original: Any, *args: Any, **kwargs: Any) -> Any:
    return 2 * original(*args, **kwargs)


def tripled(original: Any, *args: Any, **kwargs: Any) -> Any:
    return 3 * original(*args, **kwargs)


@pytest.fixture(autouse=True)
def targets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two targets whose distributions are pytest: "double" and "triple" of the same function."""
    for name, replacement in (("double", doubled), ("triple", tripled)):
        module = ModuleType(f"ccu_fast.patch.{name}")
        site = Site(Library, "forward", ("self", "x"), replacement)
        module.sites = lambda site=site: [site]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(patch.TARGETS, name, Target("pytest", "tests", "1", "1000", name))
    yield
    assert Library.forward is OWN
    assert patch.active() == {}


def test_applying_and_reverting() -> None:
    assert patch.apply("double") == [f"{__name__}.Library.forward"]
    assert Library().forward(1) == 4
    assert Child().forward(1, y=2) == 6
    patch.revert("double")
    assert Library().forward(1) == 2


def test_calls_are_counted_by_who_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_even(original: Any, self: Any, x: Any, y: int = 1) -> Any:
        if y < 0:
            raise ValueError(y)
        return NotImplemented if y % 2 else 2 * original(self, x, y)

    site = Site(Library, "forward", ("self", "x"), of_even)
    monkeypatch.setattr(sys.modules["ccu_fast.patch.double"], "sites", lambda: [site])
    with patch.applied("double"):
        name = f"{__name__}.Library.forward"
        assert patch.calls() == {"double": {name: (0, 0)}}
        assert [Library().forward(1, y) for y in range(5)] == [2, 2, 6, 4, 10]
        with pytest.raises(ValueError):
            Library().forward(1, -1)
        assert patch.calls()["double"][name] == patch.Calls(ours=3, theirs=2)
        graph = torch.compile(Library().forward, fullgraph=True, backend="eager")
        assert [graph(torch.tensor(2), 2).item() for _ in range(2)] == [8, 8]
        assert patch.calls()["double"][name] == (3, 2)
    assert patch.calls() == {}


def test_applying_twice_is_applying_once() -> None:
    patch.apply("double")
    assert patch.apply("double") == patch.active()["double"]
    assert Library().forward(1) == 4
    patch.revert("double")
    patch.revert("double")
    assert Library().forward(1) == 2


@pytest.mark.parametrize("order", [("double", "triple"), ("triple", "double")])
def test_reverting_in_any_order(order: tuple[str, str]) -> None:
    for name in ("double", "triple"):
        patch.apply(name)
    assert Library().forward(1) == 12
    patch.revert(order[0])
    assert Library().forward(1) == {"double": 4, "triple": 6}[order[1]]
    patch.revert(order[1])
    assert Library().forward(1) == 2


def test_reverting_under_another_one_s_wrapper_leaves_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    patch.apply("double")
    inner = Library.forward

    def theirs(self: Library, x: int, y: int = 1) -> int:
        return 100 + inner(self, x, y)

    monkeypatch.setattr(Library, "forward", theirs)
    assert Library().forward(1) == 104
    patch.revert("double")
    assert Library().forward(1) == 102
    Library.forward = OWN  # type: ignore[method-assign]


def test_the_context_manager_keeps_what_was_applied_before() -> None:
    with patch.applied("double", "triple"):
        with patch.applied("double"):
            assert Library().forward(1) == 12
        assert Library().forward(1) == 12
    with pytest.raises(RuntimeError), patch.applied("double"):
        raise RuntimeError
    assert Library().forward(1) == 2


def test_a_method_that_is_inherited_is_given_back_by_removing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(Child, "forward", ("self", "x"), doubled)
    monkeypatch.setattr(sys.modules["ccu_fast.patch.double"], "sites", lambda: [site])
    with patch.applied("double"):
        assert (Child().forward(1), Library().forward(1)) == (4, 2)
    assert "forward" not in vars(Child)


def test_what_is_inherited_may_be_replaced_above_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(Child, "forward", ("self", "x"), doubled)
    monkeypatch.setattr(sys.modules["ccu_fast.patch.double"], "sites", lambda: [site])
    with patch.applied("double"):
        with monkeypatch.context() as context:
            context.setattr(Library, "forward", lambda self, x: 10 * x)
            assert Child().forward(1) == 20
        assert Child().forward(1) == 4


def test_an_unknown_version_is_left_alone_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1000.0rc1")
    with pytest.warns(UserWarning, match=r"left alone: version 1000.0rc1 of pytest is not known \(known: 1 ≤"):
        assert patch.apply("double") == []
    assert Library().forward(1) == 2


def test_another_signature_is_left_alone_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [Site(Child, "forward", ("self", "x"), doubled), Site(Library, "forward", ("self", "images"), doubled)]
    monkeypatch.setattr(sys.modules["ccu_fast.patch.double"], "sites", lambda: sites)
    with pytest.warns(UserWarning, match=r"has the parameters \('self', 'x', 'y'\), expected them to begin with"):
        assert patch.apply("double") == []
    assert Child().forward(1) == 2, "half a patch"


@pytest.mark.parametrize("path", ["pytest.not_there", "pytest.not_there.Class", "pytest.NotThere"])
def test_what_has_moved_is_left_alone_with_a_warning(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sites() -> list[Site]:
        module, _, name = path.rpartition(".")
        owner = getattr(importlib.import_module(module), name)
        return [Site(owner, "forward", ("self",), doubled)]

    monkeypatch.setattr(sys.modules["ccu_fast.patch.double"], "sites", sites)
    with pytest.warns(UserWarning, match="double is left alone: .*(not_there|NotThere)"):
        assert patch.apply("double") == []


def by_a_user(function: Callable[..., Any], wraps: bool) -> Callable[..., Any]:
    """A function with the signature of ``function``, defined in another package."""
    scope: dict[str, Any] = {"__name__": "users.module", "theirs": function}
    exec("def forward(self, x, y=1): return 100 + theirs(self, x, y)", scope)
    made: Callable[..., Any] = scope["forward"]
    return functools.wraps(function)(made) if wraps else made


@pytest.mark.parametrize("wraps", [False, True])
def test_a_function_that_somebody_has_replaced_is_left_alone_with_a_warning(
    wraps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Library, "forward", by_a_user(OWN, wraps))
    with pytest.warns(UserWarning, match=r"Library.forward is not tests's own but users.module\."):
        assert patch.apply("double") == []
    assert Library().forward(1) == 102
    Library.forward = OWN  # type: ignore[method-assign]


def test_a_class_that_somebody_has_replaced_is_left_alone_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = type("Library", (Library,), {"__module__": "users.module"})
    site = Site(theirs, "forward", ("self", "x"), doubled)
    monkeypatch.setattr(sys.modules["ccu_fast.patch.double"], "sites", lambda: [site])
    with pytest.warns(UserWarning, match=r"left alone: users.module.Library is not tests's own"):
        assert patch.apply("double") == []


def test_reverting_between_two_patches_leaves_a_wrapper_that_copies_our_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    patch.apply("double")
    theirs = by_a_user(Library.forward, wraps=True)
    monkeypatch.setattr(Library, "forward", theirs)
    installed = Installed(Site(Library, "forward", ("self", "x"), tripled))
    patch.revert("double")
    installed.remove()
    assert Library.forward is theirs
    assert Library().forward(1) == 102
    Library.forward = OWN  # type: ignore[method-assign]


def test_many_threads_leave_nothing_behind() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            start = threading.Barrier(8)

            def work(number: int, start: threading.Barrier = start) -> None:
                start.wait()
                for _ in range(20):
                    with patch.applied(("double", "triple")[number % 2]):
                        Library().forward(1)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert patch.active() == {}
            assert Library.forward is OWN
    finally:
        sys.setswitchinterval(interval)


def test_a_missing_library_and_an_unknown_name() -> None:
    patch.TARGETS["double"] = Target("no-such-distribution", "tests", "1", "2", "")
    with pytest.raises(ModuleNotFoundError, match="double: no-such-distribution is not installed"):
        patch.apply("double")
    with pytest.raises(ValueError, match="name: expected one of"):
        patch.apply("clip_open")
    with pytest.raises(ValueError, match="name: expected one of"):
        patch.revert("clip_open")


def test_arguments_are_named_whatever_way_they_came() -> None:
    def function(a: int, b: int = 2, **rest: int) -> None: ...

    def strict(a: int, b: int = 2) -> None: ...

    assert arguments(function, (1,), {"c": 3}) == {"a": 1, "b": 2, "c": 3}
    assert arguments(strict, (1,), {"b": 4, "taken_by_a_decorator": 3}) == {"a": 1, "b": 4, "taken_by_a_decorator": 3}


def test_every_target_has_an_integration_and_says_what_it_replaces() -> None:
    for name, replaces in patch.targets().items():
        assert replaces
        if name not in ("double", "triple"):
            assert callable(__import__(f"ccu_fast.patch.{name}", fromlist=["sites"]).sites)
