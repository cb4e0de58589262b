"""Settings of the disaggregated-prefill proxy.

One frozen dataclass is the only place where a setting, its default, its help text and its allowed values are written.
The command line flags (``--max-body-bytes``) and the environment variables (``DISAGG_PROXY_MAX_BODY_BYTES``) are
derived from its fields. Precedence: flag, then environment, then default.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

ENV_PREFIX = "DISAGG_PROXY_"
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


class SettingsError(ValueError):
    """A setting has a value that is not allowed; the text names the flag, the value and what is allowed."""


def _field(default: Any, help_text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


@dataclass(frozen=True)
class Settings:
    """Everything the proxy can be told. Times are seconds, sizes are bytes."""

    host: str = _field("127.0.0.1", "address to listen on")
    port: int = _field(8000, "port to listen on; 0 takes a free one and prints it", low=0, high=65535)
    prefiller_host: str = _field("127.0.0.1", "host of the prefill server")
    prefiller_port: int = _field(8100, "port of the prefill server", low=1, high=65535)
    decoder_host: str = _field("127.0.0.1", "host of the decode server")
    decoder_port: int = _field(8200, "port of the decode server", low=1, high=65535)
    prefiller: tuple[str, ...] = _field((), "URL of a prefill server; repeat for several (replaces the host and port)")
    decoder: tuple[str, ...] = _field((), "URL of a decode server; repeat for several (replaces the host and port)")
    upstreams_file: str = _field(
        "", 'JSON file {"prefillers": [URL, ...], "decoders": [URL, ...]}, read again whenever it changes'
    )
    workers: int = _field(1, "worker processes", low=1, high=256)
    api_key: str = _field("", "key that clients must send as 'Authorization: Bearer KEY' (empty: no check)")
    ssl_keyfile: str = _field("", "TLS key file (PEM); needs --ssl-certfile")
    ssl_certfile: str = _field("", "TLS certificate file (PEM); needs --ssl-keyfile")
    cors_origin: tuple[str, ...] = _field((), "browser origin to allow, or *; repeat for several (none: CORS is off)")
    max_body_bytes: int = _field(128 * 1024 * 1024, "longest request body that is taken; longer ones get 413", low=1)
    max_head_bytes: int = _field(64 * 1024, "longest response head that is taken from a server", low=1024)
    connect_timeout_s: float = _field(2.0, "time to connect to a server", low=0.01)
    prefill_timeout_s: float = _field(600.0, "time for the whole prefill answer; 0: unlimited", low=0)
    decode_timeout_s: float = _field(600.0, "time until the decode answer begins; 0: unlimited", low=0)
    stream_idle_timeout_s: float = _field(
        600.0, "longest silence inside an answer, of the server or of a client that does not read; 0: unlimited", low=0
    )
    client_timeout_s: float = _field(60.0, "longest silence of a client that is sending a request", low=0.05)
    prefill_failure: str = _field(
        "decode", "when prefill fails: 'decode' asks the decoder alone, 'fail' answers 503", choices=("decode", "fail")
    )
    health_interval_s: float = _field(2.0, "time between two health checks of a server", low=0.05)
    health_timeout_s: float = _field(5.0, "time for one health check", low=0.05)
    idle_connection_s: float = _field(4.0, "how long an idle connection to a server is kept for reuse", low=0)
    drain_timeout_s: float = _field(30.0, "time that running requests get after the first stop signal", low=0)
    access_log: bool = _field(True, "write one line per request to standard output")
    log_level: str = _field("info", "least severe message logged", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        for name in ("prefiller", "decoder"):
            for url in getattr(self, name):
                parse_url(url, flag_of(name))
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise SettingsError("--ssl-keyfile and --ssl-certfile go together: set both or none")
        for name in ("ssl_keyfile", "ssl_certfile", "upstreams_file"):
            path = getattr(self, name)
            if path and not os.path.isfile(path):
                raise SettingsError(f"{flag_of(name)} {path!r}: allowed: the path of an existing file")

    @property
    def prefiller_urls(self) -> tuple[str, ...]:
        """Addresses of all prefill servers."""
        return self.prefiller or (f"http://{_bracket(self.prefiller_host)}:{self.prefiller_port}",)

    @property
    def decoder_urls(self) -> tuple[str, ...]:
        """Addresses of all decode servers."""
        return self.decoder or (f"http://{_bracket(self.decoder_host)}:{self.decoder_port}",)


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def flag_of(name: str) -> str:
    """Command line flag of a field."""
    return "--" + name.replace("_", "-")


def env_of(name: str) -> str:
    """Environment variable of a field."""
    return ENV_PREFIX + name.upper()


@dataclass(frozen=True)
class Address:
    """Where an upstream server listens."""

    host: str
    port: int
    tls: bool

    @property
    def authority(self) -> str:
        """Value of the Host header."""
        return f"{_bracket(self.host)}:{self.port}"

    @property
    def url(self) -> str:
        """The address as a URL without a path."""
        return f"{'https' if self.tls else 'http'}://{self.authority}"


def parse_url(url: str, source: str) -> Address:
    """Split an upstream URL. ``source`` (a flag or file) is named in the SettingsError raised for a bad one."""
    allowed = "allowed: http://HOST:PORT or https://HOST:PORT"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise SettingsError(f"{source} {url!r}: {allowed}") from None
    plain = not (parts.query or parts.fragment or parts.username or parts.path.strip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain or port == 0:
        raise SettingsError(f"{source} {url!r}: {allowed}")
    tls = parts.scheme == "https"
    return Address(parts.hostname, port or (443 if tls else 80), tls)


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    meta = field.metadata
    choices = meta.get("choices")
    if choices and value not in choices:
        raise SettingsError(f"{flag_of(field.name)} {value!r}: allowed: {', '.join(choices)}")
    low, high = meta.get("low"), meta.get("high")
    if low is None:
        return
    # `not (value >= low)` also refuses NaN.
    if not (value >= low) or (high is not None and value > high):
        span = f"{low} to {high}" if high is not None else f"{low} or more"
        raise SettingsError(f"{flag_of(field.name)} {value}: allowed: {span}")


def _convert(field: dataclasses.Field[Any], text: str, source: str) -> Any:
    default = field.default
    if isinstance(default, bool):
        lowered = text.strip().lower()
        if lowered in _TRUE or lowered in _FALSE:
            return lowered in _TRUE
        raise SettingsError(f"{source} {text!r}: allowed: true, false")
    if isinstance(default, int):
        try:
            return int(text)
        except ValueError:
            raise SettingsError(f"{source} {text!r}: allowed: a whole number") from None
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError:
            raise SettingsError(f"{source} {text!r}: allowed: a number") from None
    return text


def _split_list(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(part.strip() for text in texts for part in text.split(",") if part.strip())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line parser, one flag per field of Settings."""
    parser = _Parser(
        prog=prog,
        description="Proxy for disaggregated prefill: prefill on one vLLM server, decode on another.",
        epilog=f"Every flag is also an environment variable: --max-body-bytes is {env_of('max_body_bytes')}. "
        "Lists are comma separated there.",
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Settings):
        default = field.default
        shown: Any = default
        if isinstance(default, tuple):
            shown = ",".join(default)
        elif isinstance(default, bool):
            shown = str(default).lower()
        text = field.metadata["help"] + (f" (default: {shown})" if shown != "" else "")
        kwargs: dict[str, Any] = {"help": text.replace("%", "%%"), "dest": field.name, "default": None}
        if isinstance(default, bool):
            # Both `--access-log false` and a bare `--access-log` read well.
            parser.add_argument(flag_of(field.name), nargs="?", const="true", metavar="true|false", **kwargs)
        elif isinstance(default, tuple):
            parser.add_argument(flag_of(field.name), action="append", metavar="VALUE", **kwargs)
        else:
            choices = field.metadata.get("choices")
            parser.add_argument(flag_of(field.name), metavar="|".join(choices) if choices else "VALUE", **kwargs)
    return parser


def load_settings(argv: Sequence[str], environ: Mapping[str, str], prog: str | None = None) -> Settings:
    """Settings from the command line and the environment.

    Raises SettingsError for a value that is not allowed, SystemExit (status 2) for an unknown flag.
    """
    found = vars(build_parser(prog).parse_args(list(argv)))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        given, source = found[field.name], flag_of(field.name)
        if given is None:
            given, source = environ.get(env_of(field.name)), env_of(field.name)
        if given is None:
            continue
        if isinstance(field.default, tuple):
            values[field.name] = _split_list([given] if isinstance(given, str) else given)
        else:
            values[field.name] = _convert(field, given, source)
    return Settings(**values)
