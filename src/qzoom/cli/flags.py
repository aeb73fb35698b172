"""Command-line options from records: shared ones from dataclasses, a command's own from its settings class.

A parameter of a command whose annotation is one of the two is replaced by one option per field:

    @flatten
    def gate(*, model: ModelOptions, recipe: Annotated[GateRecipe, Flags("QZOOM_LABEL_GATE_")]) -> None:

- A plain dataclass annotates each field with its own `typer.Option`, as a parameter would be.
- Of a settings class, name, type, default, range and help come from `qzoom.settings.setting_fields`; the environment
  variable is the prefix and the field's name, with commas between the texts of a list. `--recipe FILE` may hold all
  fields; options take precedence.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from qzoom.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
_SOURCE = "The command line"
_SIMPLE = (bool, int, float, str, Path)


@dataclass(frozen=True, slots=True)
class Flags:
    """How a settings class becomes options."""

    prefix: str  # of the environment variables, such as "QZOOM_SERVE_"
    # fields that are options, a nested one as "maps.foreground"; empty takes all that are not nested
    only: tuple[str, ...] = ()
    # option names that are not the field's, such as {"source": "--from"}
    names: Mapping[str, str] = field(default_factory=dict)
    recipe: bool = True  # whether there is a `--recipe FILE` with all fields
    # the settings class, where the command takes the given values for `build_settings` and not the record
    of: type | None = None


def optional(text: str, *names: str, **more: Any) -> Any:
    """An option whose default is not shown, with its help."""
    return typer.Option(*names, help=text, show_default=False, **more)


def flatten(function: F) -> F:
    """The command function with one keyword-only parameter per option."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    builders: dict[str, Callable[[dict[str, Any]], Any]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        options, builders_of = _options_of(hints[name])
        if builders_of is None:
            options = {name: (hints[name], parameter.default)}
        else:
            builders[name] = builders_of
        for option, (annotation, default) in options.items():
            if option in parameters:
                raise TypeError(f"{function.__name__} has two options {option!r}.")
            parameters[option] = inspect.Parameter(
                option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        built = {name: build(values) for name, build in builders.items()}
        rest = {name: value for name, value in values.items() if name in hints and name not in built}
        return function(**rest, **built)

    command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return typing.cast(F, command)


_Options = dict[str, tuple[Any, Any]]  # parameter name to annotation and default


def _options_of(annotation: Any) -> tuple[_Options, Callable[[dict[str, Any]], Any] | None]:
    """The options of a parameter and what builds its value from them; no builder for a parameter of its own."""
    if typing.get_origin(annotation) is Annotated:
        cls, *metadata = typing.get_args(annotation)
        for flags in metadata:
            if isinstance(flags, Flags):
                return _settings_options(flags.of or cls, flags)
        return {}, None
    if not dataclasses.is_dataclass(annotation):
        return {}, None
    cls = typing.cast(type, annotation)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)
    names = [entry.name for entry in fields]
    defaults = [inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default for f in fields]
    options = {f.name: (hints[f.name], default) for f, default in zip(fields, defaults, strict=True)}
    options = dict(sorted(options.items(), key=lambda option: option[1][1] is not inspect.Parameter.empty))
    return options, lambda values: cls(**{name: values[name] for name in names})


def _settings_options(cls: type, flags: Flags) -> tuple[_Options, Callable[[dict[str, Any]], Any]]:
    from qzoom.settings import SettingField, setting_fields

    def find(path: str) -> SettingField:
        inside, _, last = path.rpartition(".")
        fields = setting_fields(find(inside).kind if inside else cls)
        return next(entry for entry in fields if entry.name == last)

    paths = flags.only or tuple(entry.name for entry in setting_fields(cls) if not _nested(entry.kind))
    fields = {path.rpartition(".")[2]: (path, find(path)) for path in paths}
    options: _Options = {}
    variables: dict[str, str] = {}  # of lists of texts, which Typer would split at blanks
    for name, (path, entry) in fields.items():
        flag = flags.names.get(path) or f"--{name.replace('_', '-')}"
        variable = flags.prefix + flag[2:].replace("-", "_").upper()
        if _items(entry.kind) is str:
            variables[name] = variable
        options[name] = (_option(entry, flag, None if name in variables else variable), None)
    if flags.recipe:
        option = optional("YAML file with any of the settings; options take precedence.", "--recipe")
        options["recipe_file"] = (Annotated[Path | None, option], None)

    def build(values: dict[str, Any]) -> Any:
        given: dict[str, Any] = {}
        for name, (path, entry) in fields.items():
            value = values[name] or _words_of(variables.get(name)) or values[name]
            if value is not None and value != []:
                _put(given, path, _value(entry.kind, value))
        recipe = values.get("recipe_file")
        return given if flags.of is not None else build_settings(cls, given, recipe, names=flags.names)

    return options, build


def build_settings(
    cls: type[T], given: Mapping[str, Any], recipe: Path | None = None, *, names: Mapping[str, str] | None = None
) -> T:
    """The settings of a recipe file and the values given as options, which take precedence (typer.BadParameter: an
    option with a wrong value; RecipeError: a recipe that cannot be used)."""
    from qzoom.settings import from_mapping, read_yaml

    values = _merged({} if recipe is None else read_yaml(recipe), given)
    try:
        source = _SOURCE if given or recipe is None else str(recipe)
        return from_mapping(cls, values, source, recipe=recipe, given=given)
    except ConfigError as error:
        if given and not str(error).startswith(f"{recipe}, line "):
            raise typer.BadParameter(_with_flag(str(error), names or {})) from error
        raise


def _with_flag(sentence: str, names: Mapping[str, str]) -> str:
    """The error sentence with the name of the option in place of the field's."""
    match = re.match(rf"{_SOURCE}: ([a-z_.]+)", sentence)
    if match is None:
        return sentence.removeprefix(f"{_SOURCE}: ")
    path, rest = match[1], sentence[match.end() :]
    if rest.startswith(": ") and path not in names:  # a rule of a nested record
        return rest[2:]
    flag = names.get(path) or "--" + path.rpartition(".")[2].replace("_", "-")
    return flag + rest


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set a value at a path such as "maps.foreground"."""
    *outer, last = path.split(".")
    for name in outer:
        values = values.setdefault(name, {})
    values[last] = value


def _merged(values: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values) if isinstance(values, Mapping) else {}
    for name, value in changes.items():
        merged[name] = _merged(merged.get(name), value) if isinstance(value, Mapping) else value
    return merged


def _words_of(variable: str | None) -> list[str]:
    """The words of an environment variable, separated by commas; they may hold blanks, as names of folders do."""
    text = os.environ.get(variable, "") if variable else ""
    return [word.strip() for word in text.split(",") if word.strip()]


def _option(entry: Any, flag: str, variable: str | None) -> Any:
    """The annotation of a field's option: unset, it is None."""
    kind, items = entry.kind, _items(entry.kind)
    if kind is bool and entry.default:
        flag = f"{flag}/--no-{flag[2:]}"
    text: Any = str
    extra: dict[str, Any] = {}
    if items is str:
        text = list[str]
    elif typing.get_origin(items) is Literal:
        text, extra["metavar"] = list[str], "A,B,..."
    elif items is not None:
        extra["metavar"] = "N,N,..."
    elif kind in _SIMPLE or typing.get_origin(kind) is Literal:
        text = kind
    info = typer.Option(
        flag, envvar=variable, help=_help(entry), show_default=_default(entry.default), show_envvar=False, **extra
    )
    return Annotated[text | None, info]


def _help(entry: Any) -> str:
    """The text of a field and its range."""
    text = str(entry.help).strip().replace("\n", " ")
    for word in ("number from ", "number of ", "number above "):
        if word in entry.expects and "list" not in entry.expects:
            limits = word.removeprefix("number ").removeprefix("of ") + entry.expects.split(word)[1]
            return f"{text} ({limits.removesuffix(' or null')})"
    return text


def _default(default: Any) -> str | bool:
    if default is None or default is dataclasses.MISSING or default in ((), ""):
        return False
    if isinstance(default, bool):
        return "yes" if default else "no"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _value(kind: Any, value: Any) -> Any:
    """An option's value as YAML would have it."""
    if isinstance(value, list):
        return value if _items(kind) is str else [part.strip() for text in value for part in text.split(",")]
    items = _items(kind)
    if isinstance(value, str) and items is not None:
        return [_literal(part) for part in value.split(",")]
    if isinstance(value, str) and kind not in _SIMPLE and typing.get_origin(kind) is not Literal:
        return _literal(value)
    return str(value) if isinstance(value, Path) else value


def _literal(text: str) -> Any:
    """JSON where the text is JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def _items(kind: Any) -> Any:
    """The item type of a tuple or list type; None for other types."""
    if typing.get_origin(kind) not in (tuple, list):
        return None
    item = typing.get_args(kind)[0]
    while typing.get_origin(item) is Annotated:
        item = typing.get_args(item)[0]
    return item


def _nested(kind: Any) -> bool:
    return bool(getattr(kind, "__pydantic_fields__", None)) or typing.get_origin(kind) is dict
