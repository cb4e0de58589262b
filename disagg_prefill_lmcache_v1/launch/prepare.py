"""From a plan to a machine that can run it: checks and set-up in their order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from disagg_prefill_lmcache_v1.launch.backends.base import Backend
from disagg_prefill_lmcache_v1.launch.checks import check_machine, check_python, exposure, lock_run_dir
from disagg_prefill_lmcache_v1.launch.messages import info
from disagg_prefill_lmcache_v1.launch.plan import Plan, ports_of
from disagg_prefill_lmcache_v1.launch.ports import settle_kv_port
from disagg_prefill_lmcache_v1.launch.settings import Settings
from disagg_prefill_lmcache_v1.launch.setup import build_model, set_up_python, set_up_redis
from disagg_prefill_lmcache_v1.launch.supervision import Supervisor
from disagg_prefill_lmcache_v1.same_user import write_secret


def prepare(plan: Plan[Settings], supervisor: Supervisor, roles: Sequence[str], *, own_run_dir: bool = False) -> None:
    """Checks and set-up for these servers; ``own_run_dir``: no other run may use it meanwhile. Raises Failure."""
    log = plan.run_dir / "setup.log"
    check_machine(plan, roles)
    for line in filter(None, (exposure(plan, name) for name in roles)):
        info(f"warning: {line}")
    if own_run_dir:
        lock_run_dir(plan)
        for name in ("summary.json", "compare.json", "report.html"):
            (plan.run_dir / name).unlink(missing_ok=True)  # an old one would pass for this run's
    set_up_python(supervisor, plan.interpreter, plan.profile, plan.profile.get("SETUP_EXTRA"), log)
    check_python(plan, supervisor)
    if "kv-server" in roles and plan.backend.name == "redis" and plan.backend.runs_server:
        set_up_redis(supervisor, plan.backend.server()[0], log)
    if set(roles) & set(plan.servers):
        build_model(supervisor, plan, log)


def make_secret(backend: Backend, *, anew: bool) -> None:
    """The file with a secret, where the backend has one; ``anew``: in the place of an old one."""
    if backend.secret_file:
        write_secret(backend.secret_file, anew=anew)


@contextlib.contextmanager
def secret_of_run(backend: Backend) -> Iterator[None]:
    """A new secret for as long as a run lasts."""
    make_secret(backend, anew=True)
    try:
        yield
    finally:
        if backend.secret_file:
            backend.secret_file.unlink(missing_ok=True)


def settle(plan: Plan[Settings], pause: Callable[[], None]) -> Plan[Settings]:
    """The plan with a KV port that can be bound, if there is one. Raises Failure."""
    if not plan.backend.ports:
        return plan
    others = [port for name, row in ports_of(plan.settings, plan.backend).items() if name != "kv_port" for port in row]
    given = plan.configuration.given("kv_port")
    port = settle_kv_port(plan.backend.port, given=given, others=others, pause=pause, host=plan.backend.host)
    return plan.with_kv_port(port)
