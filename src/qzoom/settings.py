"""Settings and recipes: one declaration gives types, ranges, error sentences, YAML, environment and help texts.

A settings class is a frozen pydantic dataclass made by `@settings`. Ranges stand in the types, what a field means
stands in the text below it, and only rules about several fields need a `__post_init__`:

    @settings
    class CropSettings:
        min_side_px: Annotated[int, Between(1, 4096)] = 28
        \"\"\"Smallest side of a crop in original pixels.\"\"\"

Every mistake is one `ConfigError` that names the source, the key, what is expected and what was found; an unknown key
comes with the closest known one.
"""

from __future__ import annotations

import contextvars
import dataclasses
import difflib
import functools
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from qzoom.errors import ConfigError, QZoomError, RecipeError

T = TypeVar("T")

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def Between(low: float | None = None, high: float | None = None) -> Any:
    """The inclusive range of a number, for `Annotated[int, Between(1, 64)]`; None leaves a side open."""
    return Field(ge=low, le=high)


Share = Annotated[float, Between(0, 1)]
"""A number from 0 to 1."""
Positive = Annotated[float, Field(gt=0)]
"""A number above 0."""
Text = Annotated[str, Field(min_length=1)]
"""A text that is not empty."""


@dataclasses.dataclass(frozen=True, slots=True)
class SettingField:
    """One field of a settings class, for command lines and documentation."""

    name: str  # as in Python and YAML
    kind: Any  # its type without range and None ("int", `tuple[str, ...]`, a nested settings class, ...)
    default: Any  # its default value; `dataclasses.MISSING` if one must be given
    help: str  # the text below the field
    expects: str  # what the error sentence says is expected, e.g. "a whole number from 1 to 64"
    optional: bool  # whether None is allowed


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def settings(cls: type[T] | None = None, *, error: type[QZoomError] = ConfigError, prefix: bool = True) -> Any:
    """Make a class of annotated fields a frozen, validated record; see the top of this file.

    Args:
        cls: the class; positional and keyword arguments are both taken, as by a dataclass.
        error: raised by the constructor instead of `ConfigError`.
        prefix: whether the constructor's error sentences begin with the class name; False for records that users
            fill by keyword arguments of a function and never see themselves.
    """

    def decorate(kind: type[T]) -> type[T]:
        _name_place(kind)
        made: Any = pydantic_dataclass(frozen=True, config=_CONFIG)(kind)
        build = made.__init__

        @functools.wraps(build)
        def __init__(self: Any, *args: Any, **values: Any) -> None:
            try:
                build(self, *args, **values)
            except ValidationError as failure:
                source = (made.__name__, ".") if prefix else ("", "")
                raise error(_sentence(failure, made, *source)) from None

        made.__init__ = __init__
        return made

    return decorate if cls is None else decorate(cls)


def from_mapping(
    cls: type[T], values: Any, source: str, *, recipe: Path | None = None, given: Mapping[str, Any] | None = None
) -> T:
    """Build settings from what was read from YAML or JSON, nested ones included.

    Args:
        cls: a settings class.
        values: the mapping; lists stand for tuples.
        recipe: the YAML file that the values were read from; a mistake in it is named with its line.
        given: those of the values that were not read from it.

    Raises:
        ConfigError: not a mapping, an unknown or missing key, a value of the wrong type or out of range; a RecipeError
            where there is a recipe.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} must be a mapping of settings, not {type(values).__name__}.")
    kind = ConfigError if recipe is None else RecipeError
    if found := _unreadable(values):
        place, what = found
        line = 0 if recipe is None else _line(recipe, place, given or {})
        where = f"{recipe}, line {line}" if line else source
        raise kind(f"{where}: {'.'.join(map(str, place[:5]))} {what}.")
    text = json.dumps(dict(values), default=str)
    reading = _reading.set(True)
    try:
        made: T = TypeAdapter(cls).validate_json(text)
    except ValidationError as failure:
        line = 0 if recipe is None else _line(recipe, _first(failure)["loc"], given or {})
        raise kind(_sentence(failure, cls, f"{recipe}, line {line}" if line else source, ": ")) from None
    finally:
        _reading.reset(reading)
    if path := _not_a_number(values):  # where any value is allowed
        raise kind(f"{source}: {path[1:]} must be a number, not NaN or infinity.")
    return made


_DEEPEST = 100
_DIGITS = 4000
"""Python writes no whole number of more than 4300 digits as text."""


def _unreadable(value: Any, place: tuple[int | str, ...] = ()) -> tuple[tuple[int | str, ...], str] | None:
    """The place of the first value that JSON cannot express, and what is wrong with it; None for none."""
    if len(place) > _DEEPEST:
        return place, f"is nested more than {_DEEPEST} deep; write it flatter"
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        return place, "holds half a surrogate pair, which is no character; write it as valid UTF-8"
    if isinstance(value, int) and value.bit_length() > _DIGITS * math.log2(10):
        return place, f"is a number of more than {_DIGITS} digits; write a smaller one"
    pairs: typing.Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int | float | None):
                return (*place, str(key)), f"is a key of type {type(key).__name__}; write it in quotes"
            if found := _unreadable(key):
                return place or (str(found[0]),), f"has a key that {found[1]}"
        pairs = ((str(key), inner) for key, inner in value.items())
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    return next((found for key, inner in pairs if (found := _unreadable(inner, (*place, key)))), None)


def _line(recipe: Path, place: typing.Sequence[int | str], given: Mapping[str, Any]) -> int:
    """The line of a value in a YAML file; 0 if it is not there."""
    import yaml

    node, line, changed = yaml.compose(recipe.read_text(encoding="utf-8"), _loader()), 0, given
    for step in place:
        if isinstance(step, str) and step in changed:
            changed = changed[step]
            if not isinstance(changed, Mapping):
                return 0
        else:
            changed = {}
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == step), None)
            if found is not None:
                line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
    return line


def _not_a_number(value: Any) -> str:
    """The place of the first NaN or infinity in nested mappings and lists, with a dot before it; empty for none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "."
    if isinstance(value, Mapping | list | tuple):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in pairs:
            if path := _not_a_number(inner):
                return f".{key}{path.removesuffix('.')}"
    return ""


_reading = contextvars.ContextVar("reading", default=False)
"""Whether settings are built from a file or mapping, so that errors have a place."""


def _name_place(kind: type) -> None:
    """Let what `__post_init__` complains about be reported with its place in the file."""
    check = kind.__dict__.get("__post_init__")
    if check is None:
        return

    @functools.wraps(check)
    def __post_init__(self: Any) -> None:
        try:
            check(self)
        except QZoomError as error:
            if _reading.get():
                raise ValueError(str(error)) from error
            raise

    kind.__post_init__ = __post_init__  # type: ignore[attr-defined]


def read_settings(
    cls: type[T], path: Path | None = None, *, env_prefix: str = "", changes: Mapping[str, Any] | None = None
) -> T:
    """Settings from a YAML file, then the environment, then the command line; the later wins, field by field.

    Args:
        cls: a settings class.
        path: a YAML file; None for none.
        env_prefix: such as "QZOOM_SERVE_"; "" reads no environment.
        changes: fields given on the command line; those that are None are left out.

    Raises:
        ConfigError: as in `from_mapping` and `read_yaml`.
    """
    values = {} if path is None else read_yaml(path)
    sources = [str(path)] if path is not None else []
    found = from_environment(cls, env_prefix) if env_prefix else {}
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    sources += ["the environment"] * bool(found) + ["the command line"] * bool(given)
    given = found | given
    return from_mapping(cls, values | given, " and ".join(sources) or cls.__name__, recipe=path, given=given)


def from_environment(cls: type, prefix: str) -> dict[str, Any]:
    """Fields of a settings class that environment variables set: `QZOOM_SERVE_PORT=8000` sets `port`.

    Values are JSON where they parse as such ("8000", "true", "[1, 2]"), texts otherwise.
    """
    values: dict[str, Any] = {}
    for field in setting_fields(cls):
        text = os.environ.get(prefix + field.name.upper())
        if text is None:
            continue
        try:
            values[field.name] = text if field.kind is str else json.loads(text)
        except (ValueError, RecursionError):
            values[field.name] = text
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML recipe. Numbers such as 1e-4 are numbers, as in YAML 1.2.

    Raises:
        RecipeError: the file cannot be read, is not YAML, holds no mapping, or a key twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _check_keys(yaml.compose(text, _loader()), path)
        values = yaml.load(text, _loader())
    except OSError as error:
        own = Path(*path.parts[1:]).with_suffix("") if path.parts[:1] == ("recipes",) else ""
        advice = f"copy it with: qzoom recipes copy {own}" if own else "give the path of a YAML file"
        raise RecipeError(f"Recipe {path} cannot be read ({error.strerror}); {advice}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"Recipe {path} is not valid YAML: it is not UTF-8; save it as UTF-8.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark is not None else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"Recipe {path}{line} is not valid YAML: {reason}.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"Recipe {path} must be a mapping of settings, not {type(values).__name__}.")
    return values


@functools.cache
def _loader() -> Any:
    """YAML's safe loader that also reads 1e-4 as a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    return Loader


def _check_keys(node: Any, path: Path, above: tuple[int, ...] = (), seen: set[int] | None = None) -> None:
    """Refuse a key that stands twice in a mapping, and an alias that holds itself."""
    seen = set() if seen is None else seen
    if id(node) in above:
        raise RecipeError(f"Recipe {path}, line {node.start_mark.line + 1}: an alias holds itself; write it out.")
    if node is None or id(node) in seen or isinstance(node.value, str):
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for item in node.value:
        key, value = item if isinstance(item, tuple) else (None, item)
        if key is not None and isinstance(key.value, str):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise RecipeError(
                    f"Recipe {path}: the key {key.value!r} stands twice, in lines {lines[key.value]} and {line}; keep "
                    "one."
                )
            lines[key.value] = line
        _check_keys(value, path, (*above, id(node)), seen)


def to_dict(value: Any) -> dict[str, Any]:
    """A settings record as plain JSON types; the inverse of `from_mapping`."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def setting_fields(cls: type) -> list[SettingField]:
    """The fields of a settings class, in order."""
    infos: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    out = []
    for name, info in infos.items():
        annotation = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
        kind, optional = _without_none(info.annotation)
        default = info.get_default(call_default_factory=True) if not info.is_required() else dataclasses.MISSING
        out.append(SettingField(name, kind, default, info.description or "", _expects(annotation), optional))
    return out


def refuse_unknown(cls: type, values: Mapping[str, Any], source: str) -> None:
    """Raise `ConfigError` for a key that a dataclass has no field for, with the closest name it has."""
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(f"{source}: unknown key {key!r}; {closest(str(key), names)}")


def closest(name: str, known: typing.Iterable[str]) -> str:
    """The end of an error sentence about an unknown name: "did you mean 'seed'?", or all known names."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(names)}."


def _sentence(failure: ValidationError, cls: type, source: str, joint: str) -> str:
    """The first mistake as one sentence."""
    error = _first(failure)
    kind, path, annotation = cls, "", Any
    for step in error["loc"]:
        known = _names(kind)
        name = list(known)[step] if isinstance(step, int) and step < len(known) and not path else str(step)
        if name in known:
            path += f".{name}" if path else name
            kind = annotation = known[name]
        elif items := _item_type(annotation):
            path += f"[{step}]" if isinstance(step, int) else f".{step}"
            kind = annotation = items
    where = f"{source}{joint}{path}" if path else source or cls.__name__
    if error["type"] in _UNKNOWN:
        return f"{where}: unknown key {str(error['loc'][-1])!r}; {closest(str(error['loc'][-1]), _names(kind))}"
    if error["type"] == "unexpected_positional_argument":
        return f"{where} takes at most {len(_names(cls))} values."
    if error["type"] in ("missing", "missing_argument"):
        return f"{where} is missing; give {_expects(annotation)}."
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    expected = _expects(annotation)
    if error["type"] == "tuple_type" and isinstance(error["input"], list):  # YAML and JSON know lists only
        expected = expected.replace("a list", "a tuple", 1)
    return f"{where} must be {expected}, not {_shown(error['input'])}."


_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def _first(failure: ValidationError) -> Any:
    """The first mistake; keys that nobody knows come before values."""
    return min(failure.errors(include_url=False), key=lambda error: error["type"] not in _UNKNOWN)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of so many digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else text[:97] + "..."


def _names(kind: Any) -> dict[str, Any]:
    """Field names of a settings class (or of a type with one) and their annotations with ranges."""
    infos: Mapping[str, FieldInfo] = getattr(_without_none(kind)[0], "__pydantic_fields__", {})
    return {
        name: Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
        for name, info in infos.items()
    }


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """A type without its range and without None, and whether None was allowed."""
    if typing.get_origin(annotation) is Annotated:
        return _without_none(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        kind = _without_none(parts[0])[0] if len(parts) == 1 else annotation
        return kind, len(parts) < len(typing.get_args(annotation))
    return annotation, False


def _item_type(annotation: Any) -> Any:
    """The type of the items of a tuple, list or mapping type; None for other types."""
    kind = _without_none(annotation)[0]
    if typing.get_origin(kind) not in (tuple, list, dict):
        return None
    return [argument for argument in typing.get_args(kind) if argument is not Ellipsis][-1]


def _expects(annotation: Any) -> str:
    """What a value of this type has to be, in words."""
    low = high = above = least = None
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = typing.get_args(annotation)
        for entry in metadata:
            for item in getattr(entry, "metadata", None) or [entry]:
                low = getattr(item, "ge", low)
                high = getattr(item, "le", high)
                above = getattr(item, "gt", above)
                least = getattr(item, "min_length", least)
        annotation, origin = inner, typing.get_origin(inner)
    if origin in (typing.Union, types.UnionType):
        words = [_ranged(part, low, high, above) for part in typing.get_args(annotation) if part is not type(None)]
        return " or ".join(words + ["null"] * (type(None) in typing.get_args(annotation)))
    return _ranged(annotation, low, high, above) + (" that is not empty" if least else "")


def _ranged(annotation: Any, low: float | None, high: float | None, above: float | None) -> str:
    if typing.get_origin(annotation) is Annotated:
        return _expects(annotation)
    word = _word(annotation)
    if low is not None and high is not None:
        return f"{word} from {low} to {high}"
    if low is not None:
        return f"{word} of at least {low}"
    if above is not None:
        return f"{word} above {above}" + (f" and at most {high}" if high is not None else "")
    return word if high is None else f"{word} of at most {high}"


def _word(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    simple: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if annotation in simple:
        return simple[annotation]
    if annotation is Path:
        return "a path"
    if origin in (tuple, list):
        items = [a for a in arguments if a is not Ellipsis]
        return f"a list, each item {_expects(items[0])}" if len(items) == 1 else f"a list of {len(items)} values"
    if origin is dict or annotation is dict:
        return "a mapping"
    names = list(_names(annotation))
    if names:
        return "a mapping with " + " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    return f"of type {getattr(annotation, '__name__', annotation)}"
