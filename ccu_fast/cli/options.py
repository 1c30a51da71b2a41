"""Options that are fields of dataclasses, and the file that gives the options of a command other defaults."""

# No `from __future__ import annotations`: typer reads the annotations.
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from ccu_fast.cli.console import FLAGS
from ccu_fast.runs.settings import read_toml, with_known_keys


@dataclasses.dataclass(frozen=True)
class Fields:
    """Marks a parameter of a command, a dict: it stands for an option for each field of a dataclass with a help text.

    Attributes:
        of: the dataclass; see :func:`ccu_fast.check.field`.
        given: whether what the command line does not give is None; by default it is the field's default.
    """

    of: type
    given: bool = False

    def options(self) -> Iterator[inspect.Parameter]:
        """As typer takes them."""
        hints = get_type_hints(self.of)
        for field in dataclasses.fields(self.of):
            if not field.metadata.get("help"):
                continue
            hint = list[str] if get_origin(hints[field.name]) is tuple else hints[field.name]
            flag = [f"--{field.name.replace('_', '-')}"] if hint is bool else []  # and no --no-…
            bounds = field.metadata["bounds"]
            told = field.metadata["help"]
            if self.given and type(field.default) in (int, float):
                told = f"{told.removesuffix('.')}; as set if not given, or {field.default:g}."
            option = typer.Option(*flag, help=told, min=bounds.get("low"), max=bounds.get("high"))
            yield inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if self.given else field.default,
                annotation=Annotated[hint | None if self.given else hint, option],
            )


def with_fields(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options that its :class:`Fields` stand for."""
    signature = inspect.signature(command)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, list[str]] = {}
    for parameter in signature.parameters.values():
        fields = next((m for m in getattr(parameter.annotation, "__metadata__", ()) if isinstance(m, Fields)), None)
        if fields is None:
            parameters.append(parameter)
        else:
            options = list(fields.options())
            parameters += options
            groups[parameter.name] = [option.name for option in options]

    FLAGS[command.__name__] = dict(filter(None, map(_flag, parameters)))

    @wraps(command)
    def expanded(**values: Any) -> None:
        for group, names in groups.items():
            values[group] = {name: values.pop(name) for name in names}
        command(**values)

    expanded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def _flag(parameter: inspect.Parameter) -> tuple[str, str] | None:
    """An option's name in Python and as it is typed; None of an argument."""
    for option in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(option, typer.models.OptionInfo):
            return parameter.name, typed(parameter.name, option)
    return None


def typed(name: str, option: typer.models.OptionInfo) -> str:
    """An option as it is typed; in ``Annotated`` typer holds the first of its names where a default would be."""
    first = option.default if isinstance(option.default, str) else None
    return first or next(iter(option.param_decls or ()), f"--{name.replace('_', '-')}")


def _read_config(context: typer.Context, parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """The file's values become the defaults of the options."""
    if value is None:
        return None
    options = {str(p.name): p for p in context.command.params if p.name not in ("help", "config")}
    given = with_known_keys(read_toml(value, "config"), options, "config", value)
    before = context.default_map or {}  # an option's callback may add to them while its value is tried below
    for name, item in given.items():
        try:
            options[name].process_value(context, item)
        except typer.BadParameter as error:
            raise ValueError(
                f"config {name}: expected another value in {value}, got {item!r}: {error.message}"
            ) from error
    context.default_map = {**before, **given}
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file with options by their names (eps = 8, skip-bad = true); flags win.",
        callback=_read_config,
        is_eager=True,
    ),
]
