"""The whole example: KV server, prefill and decode server, proxy, load and probe. Leaves nothing running."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from disagg_prefill_lmcache_v1.launch.checks import check_redis_answers
from disagg_prefill_lmcache_v1.launch.commands import STATUS_PAGE, build_command, plain_servers, server_address
from disagg_prefill_lmcache_v1.launch.load_size import load_warning, rate_warning
from disagg_prefill_lmcache_v1.launch.logs import start_problem
from disagg_prefill_lmcache_v1.launch.masked import with_masked_output
from disagg_prefill_lmcache_v1.launch.messages import Failure, info
from disagg_prefill_lmcache_v1.launch.plan import Plan
from disagg_prefill_lmcache_v1.launch.ports import address_text
from disagg_prefill_lmcache_v1.launch.prepare import prepare, secret_of_run, settle
from disagg_prefill_lmcache_v1.launch.settings import Settings
from disagg_prefill_lmcache_v1.launch.supervision import Child, Supervisor, Target
from disagg_prefill_lmcache_v1.settings import authority

# LMCache goes on without any reuse when it cannot work.
UNHEALTHY = re.compile(r"LMCache is unhealthy|degraded mode|Failed to initialize .*remote", re.IGNORECASE)


def log_of(plan: Plan[Settings], role: str) -> Path:
    """Log file of a server."""
    return plan.run_dir / f"{role.replace('-', '_')}.log"


class Example:
    """One run."""

    def __init__(self, plan: Plan[Settings], supervisor: Supervisor) -> None:
        self.plan = plan
        self.supervisor = supervisor
        self.children: dict[str, Child] = {}

    def run(self) -> None:
        """Raises Failure."""
        self.prepare()
        with secret_of_run(self.plan.backend):
            self.start_servers()
            if self.plan.settings.serve:
                self.serve()
            else:
                self.measure()

    def prepare(self) -> None:
        """Tells what will run, checks, sets up."""
        plan, settings = self.plan, self.plan.settings
        info(
            f"device {settings.device} ({plan.configuration.device_reason}), backend {settings.backend}, "
            f"tensor parallel size {settings.tensor_parallel_size}, model {plan.model.served_name}"
        )
        if plan.cards.shared:
            share = plan.profile.get("SHARED_GPU_MEMORY_UTILIZATION")
            info(f"one card for both servers: each takes {share} of its memory")
        roles = [*plan.servers, "proxy", *(["kv-server"] if plan.backend.runs_server else [])]
        prepare(plan, self.supervisor, roles, own_run_dir=True)
        if settings.num_prompts and not settings.serve:
            rate = rate_warning(plan, max(settings.request_rate), settings.input_len)
            for warning in (load_warning(plan, settings.num_prompts, settings.input_len), rate):
                if warning:
                    info(warning)

    def start(self, role: str) -> None:
        command = build_command(self.plan, role)
        words = with_masked_output(self.plan.backend.url, command.words)
        environment = command.full_environment(self.plan.environ)
        log = log_of(self.plan, role)
        info(f"starting {role} on {address_text(server_address(self.plan, role))} (log: {log})")
        self.children[role] = self.supervisor.start(role, words, environment, log)

    def await_ready(self, timeout_s: float, roles: Sequence[str], path: str) -> None:
        targets = []
        for role in roles:
            log = log_of(self.plan, role)
            server = role in (*self.plan.servers, *plain_servers(self.plan))
            problem = (lambda log=log: start_problem(log)) if server else None
            host = self.plan.backend.reach if role == "kv-server" else self.plan.reach
            targets.append(Target(self.children[role], server_address(self.plan, role), path, problem, host))
        self.supervisor.await_ready(timeout_s, targets)

    def start_servers(self) -> None:
        """All servers, until they are ready and LMCache works in both. Raises Failure."""
        plan = self.plan
        if plan.backend.runs_server:
            self.plan = plan = settle(plan, self.supervisor.tick)
            self.start("kv-server")
            self.await_ready(float(plan.profile.get("KV_READY_TIMEOUT")), ["kv-server"], "")
            if plan.backend.name == "redis":
                check_redis_answers(plan, self.supervisor)
        self.start_behind("proxy", plan.servers)
        self.check_lmcache()

    def start_behind(self, proxy: str, order: Sequence[str]) -> None:
        """These vLLM servers and a proxy before them, until they are ready. Raises Failure."""
        timeout = self.plan.settings.ready_timeout
        for name in order:
            self.start(name)
            # Servers on one card size their memory by what is free, so the second must come after the first.
            if self.plan.cards.shared and name == order[0]:
                self.await_ready(timeout, [name], "/health")
        self.start(proxy)
        proxy_timeout = float(self.plan.profile.get("PROXY_READY_TIMEOUT"))
        self.await_ready(proxy_timeout, [proxy], "/health")
        self.await_ready(timeout, order, "/health")
        self.await_ready(proxy_timeout, [proxy], "/ready")  # it has noticed all

    def check_lmcache(self) -> None:
        """LMCache goes on without any reuse when it cannot work; the example must not. Raises Failure."""
        for role in self.plan.servers:
            log = log_of(self.plan, role)
            with log.open(encoding="utf-8", errors="replace") as lines:
                if any(UNHEALTHY.search(line) for line in lines):
                    raise Failure(f"LMCache in the {role} works without its KV store", log)

    def serve(self) -> None:
        """Prints a request to try and stays until a signal or a death."""
        plan = self.plan
        if plan.settings.kv_load == "auto":  # the first request is already decided by measurements
            command = build_command(plan, "calibration")
            self.supervisor.run_step(
                "measuring how fast the decoder computes", command.words, command.full_environment(plan.environ),
                log_of(plan, "calibration"),
            )  # fmt: skip
        info("ready. Try:")
        print(curl(plan), flush=True)
        if STATUS_PAGE not in plan.environ:
            info(f"status page: {proxy_url(plan)}/")
        info(f"logs: {plan.run_dir}; Ctrl-C ends everything")
        while True:
            self.supervisor.tick()

    def measure(self) -> None:
        """Load and correctness probe. Raises Failure."""
        plan = self.plan
        command = build_command(plan, "load")
        child = self.supervisor.start("load", command.words, command.full_environment(plan.environ), None)
        status = self.supervisor.await_end(child)
        if status:
            raise Failure(f"the load or the correctness probe failed (exit status {status}; logs: {plan.run_dir})")
        self.check_lmcache()
        info(f"done; logs, summary.json and report.html: {plan.run_dir}")


def proxy_url(plan: Plan[Settings]) -> str:
    """Where clients find the proxy."""
    return f"http://{authority(plan.settings.advertise_host or plan.reach, plan.settings.proxy_port)}"


def curl(plan: Plan[Settings]) -> str:
    """A request to paste; the proxy's key stays in its variable."""
    body = json.dumps({"model": plan.model.served_name, "prompt": "Once upon a time", "max_tokens": 16})
    key = ' -H "Authorization: Bearer $DISAGG_PROXY_API_KEY"' if plan.environ.get("DISAGG_PROXY_API_KEY") else ""
    return f"curl {proxy_url(plan)}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'"
