"""``--compare``: plain servers, and then the prefill and decode servers on the same cards, under the same load.

The load is measure/compare.py's, one process a step: it checks the workload before any server is started, measures each
arm, and says the result. Leaves nothing running.
"""

from __future__ import annotations

from disagg_prefill_lmcache_v1.launch.commands import PLAIN_PROXY, build_command, plain_servers
from disagg_prefill_lmcache_v1.launch.example import Example, log_of
from disagg_prefill_lmcache_v1.launch.messages import Failure, UsageError, info
from disagg_prefill_lmcache_v1.launch.plan import Plan
from disagg_prefill_lmcache_v1.launch.prepare import secret_of_run
from disagg_prefill_lmcache_v1.launch.settings import Settings
from disagg_prefill_lmcache_v1.launch.supervision import Supervisor

USAGE_STATUS = 2


def run_comparison(plan: Plan[Settings]) -> None:
    """Raises Failure."""
    grace_s = float(plan.profile.get("STOP_GRACE"))
    with Supervisor(grace_s=grace_s) as supervisor:
        example = Example(plan, supervisor)
        example.prepare()
        step(example, "check")
        info(f"{len(plan.servers)} plain servers")
        example.start_behind(PLAIN_PROXY, tuple(plain_servers(plan)))
        step(example, "plain")
    with Supervisor(grace_s=grace_s) as supervisor, secret_of_run(plan.backend):
        info(f"prefill servers: {plan.settings.prefillers}, decode servers: {plan.settings.decoders}")
        example = Example(plan, supervisor)
        example.start_servers()
        probe(example)
        step(example, "pair")
        example.check_lmcache()
    with Supervisor(grace_s=grace_s) as supervisor:
        step(Example(plan, supervisor), "result")
    info(f"done; logs, compare.json and report.html: {plan.run_dir}")


def step(example: Example, name: str) -> None:
    """One step of the comparison. Raises Failure."""
    plan, supervisor = example.plan, example.supervisor
    command = build_command(plan, f"compare-{name}")
    child = supervisor.start(command.name, command.words, command.full_environment(plan.environ), None)
    status = supervisor.await_end(child)
    if status == USAGE_STATUS:
        raise UsageError("the load of the comparison is refused, as told above")
    if status:
        raise Failure(f"step {name} of the comparison failed (exit status {status}; logs: {plan.run_dir})")


def probe(example: Example) -> None:
    """Answers against those that the prefill server gives alone, and what was reused. Raises Failure."""
    plan, supervisor = example.plan, example.supervisor
    command = build_command(plan, "probe")
    environment, log = command.full_environment(plan.environ), log_of(plan, "probe")
    supervisor.run_step("comparing answers with one server's", command.words, environment, log)
