"""One server of the example in the foreground: the launcher script's main program."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from disagg_prefill_lmcache_v1.launch.backends.base import Backend
from disagg_prefill_lmcache_v1.launch.commands import build_command
from disagg_prefill_lmcache_v1.launch.masked import with_masked_output
from disagg_prefill_lmcache_v1.launch.messages import Failure, UsageError, exit_status, mask_passwords
from disagg_prefill_lmcache_v1.launch.plan import ROLES, Plan, make_plan
from disagg_prefill_lmcache_v1.launch.ports import answers
from disagg_prefill_lmcache_v1.launch.prepare import make_secret, prepare, settle
from disagg_prefill_lmcache_v1.launch.settings import Settings, read_configuration
from disagg_prefill_lmcache_v1.launch.supervision import Supervisor

SERVERS = ("prefiller", "decoder", "proxy", "kv-server")


def main(argv: Sequence[str], environ: Mapping[str, str], prog: str) -> int:
    """Entry of the launcher script; becomes the server. Returns the exit status of everything else."""
    return exit_status(lambda: run(argv, environ, prog))


def run(argv: Sequence[str], environ: Mapping[str, str], prog: str) -> None:
    """Raises Failure."""
    configuration = read_configuration(
        Settings, argv, environ, prog=f"{prog} prefiller|decoder|proxy|kv-server [model]",
        description="Starts one server of the example.", words=True,
    )  # fmt: skip
    words = configuration.words
    if not words:
        raise UsageError("name a server: prefiller, decoder, proxy or kv-server")
    role = words[0]
    if role not in SERVERS:
        raise UsageError(f"unknown server '{role}': allowed: {', '.join(SERVERS)}")
    if len(words) > 2:
        raise UsageError(f"unexpected argument '{words[2]}'")
    if words[1:]:
        configuration = configuration.with_model(words[1])
    plan = make_plan(configuration, environ, role)
    if plan.settings.dry_run:
        print(f"# {role}\n{build_command(plan, role).shell_line(environ)}")
        return
    if not plan.settings.prepared:
        plan = prepare_server(plan, role)
    if role != "proxy":
        make_secret(plan.backend, anew=role == "kv-server")
    command = build_command(plan, role)
    words = with_masked_output(plan.backend.url, command.words)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and what is ignored is inherited
    try:
        os.execvpe(words[0], words, command.full_environment(environ))
    except OSError as error:
        raise Failure(f"cannot start {words[0]}: {error.strerror}") from error


def prepare_server(plan: Plan[Settings], role: str) -> Plan[Settings]:
    """Checks and set-up of a server that is started by hand. Raises Failure."""
    backend = plan.backend
    if role == "kv-server" and not backend.starts_server:
        raise Failure(f"with --backend {backend.name} there is no KV server to start: decoders fetch from prefillers")
    if role == "kv-server" and backend.url:
        raise Failure("with --kv-url there is no KV server to start")
    with Supervisor(grace_s=float(plan.profile.get("STOP_GRACE"))) as supervisor:
        prepare(plan, supervisor, [role])
        if role in ROLES and backend.starts_server and not store_answers(backend):
            raise Failure(
                f"no KV server answers at {mask_passwords(backend.store_url)}: start one first (kv-server), or name "
                "another with --kv-url"
            )
        return settle(plan, supervisor.tick) if role == "kv-server" else plan


def store_answers(backend: Backend) -> bool:
    """Whether something listens where the store should. A Redis that runs already has been asked by preflight."""
    if backend.url and backend.name == "redis":
        return True
    parts = urlsplit(backend.store_url)
    if not backend.ports:
        return answers(parts.path)
    return answers(parts.port or 0, parts.hostname or "")
