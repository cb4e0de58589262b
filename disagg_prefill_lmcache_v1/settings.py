"""One way to declare a setting: a field of a dataclass, made by :func:`setting`.

The field holds the default, the help text and what is allowed. From it come the command line flag (``--kv-port``), the
environment variable (prefix and ``KV_PORT``), the error message and the row of the documentation table. A flag wins
over the environment, the environment over a fallback (a device's profile), that over the default; an empty value
counts as not given. Standard library alone: the launcher uses this before anything is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_KINDS = {bool: "switch", int: "whole", float: "number", tuple: "list", str: "text"}


class SettingsError(ValueError):
    """A value that is not allowed; the text names the flag or variable, the value and what is allowed."""


def setting(
    default: Any,
    help: str,
    *,
    kind: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
    pattern: str = "",
    allowed: str = "",
    aliases: Sequence[str] = (),
    flag: bool = True,
    env: str | None = None,
    shown: str | None = None,
) -> Any:
    """A field of a settings dataclass.

    Args:
        kind: ``text``, ``whole``, ``number``, ``switch``, ``list``, ``words`` (a list of several words after one flag),
            ``numbers`` (of one word, with commas) or ``path``; from the default's type if not given (needed where the
            default is None: "not given").
        low, high, above: limits of a number; low and high belong to the range, above does not.
        choices: the only values of a text.
        pattern, allowed: regular expression for the whole text, and what it allows in words.
        aliases: further flags, whole (``--tp-size``).
        flag: False for what only the environment sets.
        env: name of the environment variable instead of the derived one; "" for none.
        shown: default as help and documentation show it.
    """
    if not kind:
        kind = "path" if isinstance(default, Path) else _KINDS.get(type(default), "text")
    metadata = {
        "help": help, "kind": kind, "low": low, "high": high, "above": above, "choices": tuple(choices),
        "pattern": pattern, "allowed": allowed, "aliases": tuple(aliases), "flag": flag, "env": env, "shown": shown,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(name: str) -> str:
    """Command line flag of a field."""
    return "--" + name.replace("_", "-")


def env_of(field: dataclasses.Field[Any], prefix: str) -> str:
    """Environment variable of a field, "" if it has none."""
    explicit = field.metadata["env"]
    return prefix + field.name.upper() if explicit is None else explicit


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default as a person writes it, "" if there is none."""
    if field.metadata["shown"] is not None:
        return field.metadata["shown"]
    if field.default is None or field.default == "":
        return ""
    if isinstance(field.default, tuple):
        return ",".join(str(each) for each in field.default)
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


# --- command line


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line in one line, which begins with ``lead`` or its name, and exits with status 2."""

    lead = ""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^unrecognized arguments: (-\S+).*", r"unknown flag \1", message)
        message = re.sub(r"^unrecognized arguments: (\S+).*", r"unexpected argument '\1'", message)
        message = re.sub(r"^argument (--[\w-]+)\S*: expected .*argument$", r"\1 needs a value", message)
        message = re.sub(r"^argument (--[\w-]+)\S*: ignored explicit argument .*", r"\1 takes no value", message)
        self.exit(2, f"{self.lead or f'{self.prog}: error'}: {message} (see --help)\n")


class Typed(str):
    """A value with the flag that it was given by, which may be an alias."""

    flag = ""


class _Store(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        value = Typed(values)
        value.flag = option_string or ""
        setattr(namespace, self.dest, value)


def parser_of(cls: type, *, prefix: str, prog: str | None = None, description: str = "", epilog: str = "") -> Parser:
    """A parser with one flag for each field; what is not given is None in its result. All values are texts."""
    parser = Parser(
        prog=prog, description=description, epilog=epilog, allow_abbrev=False, formatter_class=argparse.HelpFormatter
    )
    for field in dataclasses.fields(cls):
        meta = field.metadata
        if not meta.get("flag"):
            continue
        default = default_text(field)
        text = meta["help"] + (f" (default: {default})" if default else "")
        more: dict[str, Any] = {"help": text.replace("%", "%%"), "dest": field.name, "default": None}
        if meta["kind"] == "switch" and not field.default:
            more |= {"action": "store_const", "const": "true"}
        elif meta["kind"] == "switch":  # `--access-log false` and a bare `--access-log`
            more |= {"nargs": "?", "const": "true", "metavar": "true|false"}
        elif meta["kind"] == "list":
            more |= {"action": "append", "metavar": "VALUE"}
        elif meta["kind"] == "words":
            more |= {"nargs": "+", "metavar": "VALUE"}
        else:
            words = {"whole": "N", "number": "X", "numbers": "X,...", "path": "PATH"}
            more["action"] = _Store
            more["metavar"] = "|".join(meta["choices"]) or words.get(meta["kind"], "VALUE")
        parser.add_argument(flag_of(field.name), *meta["aliases"], **more)
    return parser


# --- values


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Values by field name, and by which flag, variable or fallback each was given ("" for a default)."""

    values: dict[str, Any]
    sources: dict[str, str]


def resolve(
    cls: type,
    given: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    prefix: str,
    fallback: Mapping[str, str] | None = None,
    fallback_name: str = "",
) -> Resolved:
    """The value of each field, converted and checked. Fallback's keys are the fields' names in capitals.

    Raises:
        SettingsError: a value that is not allowed.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        if "kind" not in field.metadata:
            continue
        variable = env_of(field, prefix)
        places = (
            (given.get(field.name), getattr(given.get(field.name), "flag", flag_of(field.name))),
            (environ.get(variable) if variable else None, variable),
            ((fallback or {}).get(field.name.upper()), f"{fallback_name}{field.name.upper()}"),
        )
        for raw, source in places:
            if raw is not None and raw != "":
                values[field.name] = check(field, convert(field, raw, source), source)
                sources[field.name] = source
                break
        else:
            values[field.name], sources[field.name] = field.default, ""
    return Resolved(values, sources)


def load(
    cls: type[T],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    prefix: str,
    prog: str | None = None,
    description: str = "",
    epilog: str = "",
) -> T:
    """An instance from the command line and the environment.

    Raises:
        SettingsError: a value that is not allowed. SystemExit with status 2: an unknown flag; 0: --help.
    """
    parser = parser_of(cls, prefix=prefix, prog=prog, description=description, epilog=epilog)
    return cls(**resolve(cls, vars(parser.parse_args(list(argv))), environ, prefix=prefix).values)


def validate(instance: Any) -> None:
    """Check all fields of an instance that was made by code (for ``__post_init__``). Raises SettingsError."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if "kind" in field.metadata and value != field.default:
            check(field, value, flag_of(field.name))


def convert(field: dataclasses.Field[Any], raw: Any, source: str) -> Any:
    """The value of a text (of a list of texts for the kinds ``list`` and ``words``). Raises SettingsError."""
    kind = field.metadata["kind"]
    if kind == "words":
        return tuple(re.findall(r"[^\s,]+", raw if isinstance(raw, str) else " ".join(raw)))
    if kind == "list":
        texts = [raw] if isinstance(raw, str) else raw
        return tuple(part.strip() for text in texts for part in text.split(",") if part.strip())
    if kind == "switch":
        if raw.strip().lower() in _TRUE + _FALSE:
            return raw.strip().lower() in _TRUE
    elif kind == "whole":
        if re.fullmatch(r"[+-]?[0-9]{1,18}", raw.strip()):
            return int(raw)
    elif kind == "number":
        if re.fullmatch(_NUMBER, raw.strip()):
            return float(raw)
    elif kind == "numbers":
        if all(re.fullmatch(_NUMBER, part.strip()) for part in raw.split(",")):
            return tuple(float(part) for part in raw.split(","))
    else:
        return Path(raw) if kind == "path" else raw
    raise SettingsError(f"{source} {raw!r}: allowed: {allowed_text(field)}")


def check(field: dataclasses.Field[Any], value: Any, source: str) -> Any:
    """The value, if it is allowed. Raises SettingsError."""
    meta = field.metadata
    if meta["kind"] == "numbers" and isinstance(value, tuple):
        return tuple(check(field, one, source) for one in value)
    good = True
    if meta["choices"]:
        good = value in meta["choices"]
    elif meta["pattern"]:
        good = all(re.fullmatch(meta["pattern"], str(one)) for one in (value if isinstance(value, tuple) else [value]))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high, above = meta["low"], meta["high"], meta["above"]
        good = math.isfinite(value)
        good = good and (low is None or value >= low) and (high is None or value <= high)
        good = good and (above is None or value > above)
    if not good:
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        shown = f"{value:g}" if isinstance(value, float) else repr(text)
        raise SettingsError(f"{source} {shown}: allowed: {allowed_text(field)}")
    return value


def allowed_text(field: dataclasses.Field[Any]) -> str:
    """What a field allows, in words."""
    meta = field.metadata
    if meta["allowed"]:
        return meta["allowed"]
    if meta["choices"]:
        return ", ".join(meta["choices"])
    if meta["kind"] == "switch":
        return "true, false"
    if meta["kind"] not in ("whole", "number", "numbers"):
        return "any text"
    words = "a whole number" if meta["kind"] == "whole" else "a number"
    if meta["low"] is not None:
        words += f" from {meta['low']}" + (f" to {meta['high']}" if meta["high"] is not None else " on")
    elif meta["above"] is not None:
        words += f" above {meta['above']}" + (f", at most {meta['high']}" if meta["high"] is not None else "")
    return words + (", or several with commas" if meta["kind"] == "numbers" else "")


def table(cls: type, *, prefix: str) -> str:
    """The settings as a Markdown table."""
    lines = ["| flag | environment | default | |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        meta = field.metadata
        if "kind" not in meta:
            continue
        names = [flag_of(field.name), *meta["aliases"]] if meta["flag"] else []
        told = all(choice in meta["help"] for choice in meta["choices"])
        text = meta["help"] + ("" if told else f": {', '.join(meta['choices'])}")
        cells = [
            ", ".join(f"`{name}`" for name in names),
            f"`{env_of(field, prefix)}`" if env_of(field, prefix) else "",
            f"`{default_text(field)}`" if default_text(field) else "",
            text.replace("|", r"\|"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# --- hosts

HOST = {"pattern": r"[A-Za-z0-9_.:%-]+", "allowed": "an address or a name, as in 0.0.0.0, 10.0.0.1 or node-1"}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there. A name other than localhost may be any machine's."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def authority(host: str, port: int) -> str:
    """``HOST:PORT`` as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
