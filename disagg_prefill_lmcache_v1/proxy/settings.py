"""Settings of the disaggregated-prefill proxy: one field each, see the shared settings module.

``--max-body-bytes`` is ``DISAGG_PROXY_MAX_BODY_BYTES`` in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from disagg_prefill_lmcache_v1.settings import Parser, SettingsError, flag_of, load, parser_of, setting, validate

ENV_PREFIX = "DISAGG_PROXY_"
_DESCRIPTION = "Proxy for disaggregated prefill: prefill on one vLLM server, decode on another."
_EPILOG = (
    f"Every flag is also an environment variable: --max-body-bytes is {ENV_PREFIX}MAX_BODY_BYTES. "
    "Lists are comma separated there."
)


@dataclass(frozen=True)
class Settings:
    """Everything the proxy can be told. Times are seconds, sizes are bytes."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0 takes a free one and prints it", low=0, high=65535)
    prefiller_host: str = setting("127.0.0.1", "host of the prefill server")
    prefiller_port: int = setting(8100, "port of the prefill server", low=1, high=65535)
    decoder_host: str = setting("127.0.0.1", "host of the decode server")
    decoder_port: int = setting(8200, "port of the decode server", low=1, high=65535)
    prefiller: tuple[str, ...] = setting((), "URL of a prefill server; repeat for several (replaces the host and port)")
    decoder: tuple[str, ...] = setting((), "URL of a decode server; repeat for several (replaces the host and port)")
    route: str = setting(
        "always", "which requests a prefill server gets: always: all; never: none; auto: those whose first token it "
        "brings sooner, or whose prompt would hold up other answers; TOKENS: prompts of at least so many tokens",
        pattern="always|never|auto|[1-9][0-9]{0,8}", allowed="always, never, auto or a number of tokens",
    )  # fmt: skip
    ttft_target_ms: float = setting(
        0.0, "--route auto: a prefill server is asked while the first token is expected within this; 0: no such target",
        low=0,
    )  # fmt: skip
    itl_target_ms: float = setting(
        30.0, "--route auto: gap between tokens that 99 of 100 should keep; rounded down to a bucket of the ITL metric",
        low=1,
    )  # fmt: skip
    prefix_affinity: str = setting(
        "on", "several prefill servers: on: a prompt goes to the one that knows its beginning, unless more work waits "
        "there than that saves; off: to the one with the fewest tokens to compute", choices=("on", "off"),
    )  # fmt: skip
    upstreams_file: str = setting(
        "", 'JSON file {"prefillers": [URL, ...], "decoders": [URL, ...]}, read again whenever it changes'
    )
    decode_only: bool = setting(False, "no prefill servers: each request goes to the decode server that has the fewest")
    workers: int = setting(1, "worker processes", low=1, high=256)
    api_key: str = setting("", "key that clients must send as 'Authorization: Bearer KEY' (empty: no check)")
    ssl_keyfile: str = setting("", "TLS key file (PEM); needs --ssl-certfile")
    ssl_certfile: str = setting("", "TLS certificate file (PEM); needs --ssl-keyfile")
    cors_origin: tuple[str, ...] = setting((), "browser origin to allow, or *; repeat for several (none: CORS is off)")
    max_body_bytes: int = setting(128 * 1024 * 1024, "longest request body that is taken; longer ones get 413", low=1)
    max_head_bytes: int = setting(
        64 * 1024, "longest head that is taken, of a request (431) or of a server's answer (502)", low=1024
    )
    max_in_flight: int = setting(0, "requests in progress at once in each worker; 0: no limit", low=0)
    max_queue: int = setting(0, "requests that wait for a place when --max-in-flight is reached; more get 429", low=0)
    queue_timeout_s: float = setting(30.0, "longest wait for a place; then 503", low=0.01)
    trusted_kv_transfer_params: bool = setting(
        False, "take kv_transfer_params from clients; without it they get 400, for they steer other people's KV caches"
    )
    connect_timeout_s: float = setting(2.0, "time to connect to a server", low=0.01)
    prefill_timeout_s: float = setting(600.0, "time for the whole prefill answer; 0: unlimited", low=0)
    decode_timeout_s: float = setting(600.0, "time until the decode answer begins; 0: unlimited", low=0)
    stream_idle_timeout_s: float = setting(
        600.0, "longest silence inside an answer, of the server or of a client that does not read; 0: unlimited", low=0
    )
    client_timeout_s: float = setting(
        60.0, "time for a request's head, and longest silence inside its body, which has a second more for each KiB",
        low=0.05,
    )  # fmt: skip
    prefill_failure: str = setting(
        "decode", "when prefill fails: 'decode' asks the decoder alone, 'fail' answers 503", choices=("decode", "fail")
    )
    kv_hand_over: str = setting(
        "store", "how KV goes from prefill to decode: store: by a KV store, with nothing to do here; params: the "
        "decode server fetches it from the prefill server, whose answer says how (vLLM's NixlConnector)",
        choices=("store", "params"),
    )  # fmt: skip
    suspect_request_s: float = setting(
        600.0, "how long a request is remembered that servers died of: after one it gets no prefill, after two it is "
        "refused; 0: not at all", low=0,
    )  # fmt: skip
    health_interval_s: float = setting(2.0, "time between two health checks of a server", low=0.05)
    health_timeout_s: float = setting(5.0, "time for one health check", low=0.05)
    idle_connection_s: float = setting(4.0, "how long an idle connection to a server is kept for reuse", low=0)
    drain_timeout_s: float = setting(30.0, "time that running requests get after the first stop signal", low=0)
    access_log: bool = setting(True, "write one line per request to standard output")
    status_page: bool = setting(False, "show a live status page at /; what it shows needs the API key, if there is one")
    otlp_traces_endpoint: str = setting(
        "", "URL of an OpenTelemetry collector (OTLP/HTTP), like http://127.0.0.1:4318/v1/traces, which gets a trace "
        "of each request (empty: none)", pattern=r"https?://[^\s/]+\S*", allowed="a URL like http://HOST:4318/v1/traces",
    )  # fmt: skip
    log_level: str = setting("info", "least severe message logged", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        validate(self)
        for name in ("prefiller", "decoder"):
            for url in getattr(self, name):
                parse_url(url, flag_of(name))
        if self.decode_only and (self.prefiller or self.upstreams_file):
            raise SettingsError("--decode-only: allowed with --decoder, not with --prefiller or --upstreams-file")
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise SettingsError("--ssl-keyfile and --ssl-certfile go together: set both or none")
        for name in ("ssl_keyfile", "ssl_certfile", "upstreams_file"):
            path = getattr(self, name)
            if path and not os.path.isfile(path):
                raise SettingsError(f"{flag_of(name)} {path!r}: allowed: the path of an existing file")

    @property
    def prefiller_urls(self) -> tuple[str, ...]:
        """Addresses of all prefill servers."""
        if self.decode_only:
            return ()
        return self.prefiller or (f"http://{_bracket(self.prefiller_host)}:{self.prefiller_port}",)

    @property
    def decoder_urls(self) -> tuple[str, ...]:
        """Addresses of all decode servers."""
        return self.decoder or (f"http://{_bracket(self.decoder_host)}:{self.decoder_port}",)


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


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


def build_parser(prog: str | None = None) -> Parser:
    """The command line parser, one flag per field of Settings."""
    return parser_of(Settings, prefix=ENV_PREFIX, prog=prog, description=_DESCRIPTION, epilog=_EPILOG)


def load_settings(argv: Sequence[str], environ: Mapping[str, str], prog: str | None = None) -> Settings:
    """Settings from the command line and the environment.

    Raises SettingsError for a value that is not allowed, SystemExit (status 2) for an unknown flag.
    """
    return load(Settings, argv, environ, prefix=ENV_PREFIX, prog=prog, description=_DESCRIPTION, epilog=_EPILOG)
