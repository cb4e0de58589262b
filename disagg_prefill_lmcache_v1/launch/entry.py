"""Entry of the example script: what is asked for, and who does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from disagg_prefill_lmcache_v1.launch.commands import COMPARE_STEPS, PLAIN_PROXY, build_command, plain_servers
from disagg_prefill_lmcache_v1.launch.compare import run_comparison
from disagg_prefill_lmcache_v1.launch.example import Example, log_of
from disagg_prefill_lmcache_v1.launch.messages import UsageError, exit_status
from disagg_prefill_lmcache_v1.launch.plan import Plan, make_plan
from disagg_prefill_lmcache_v1.launch.settings import Configuration, Settings, read_configuration
from disagg_prefill_lmcache_v1.launch.supervision import Supervisor

OF_COMPARISON = ("goodput", "workload", "burstiness", "sweep")


def main(argv: Sequence[str], environ: Mapping[str, str], prog: str) -> int:
    """Entry of the example script; returns the exit status."""
    return exit_status(lambda: run(argv, environ, prog))


def run(argv: Sequence[str], environ: Mapping[str, str], prog: str) -> None:
    """Raises Failure."""
    configuration = read_configuration(
        Settings, argv, environ, prog=prog, description="Runs the disaggregated prefill example."
    )
    plan = make_plan(configuration, environ)
    check_load(configuration)
    if plan.settings.dry_run:
        dry_run(plan)
    elif plan.settings.compare:
        run_comparison(plan)
    else:
        with Supervisor(grace_s=float(plan.profile.get("STOP_GRACE"))) as supervisor:
            Example(plan, supervisor).run()


def check_load(configuration: Configuration[Settings]) -> None:
    """Raises UsageError for settings of the load that do not fit together."""
    settings = configuration.settings
    made_here = not settings.compare or settings.workload == "fixed"
    if made_here and settings.num_prompts and settings.input_len + settings.output_len > settings.max_model_len:
        raise UsageError(
            f"--input-len {settings.input_len} plus --output-len {settings.output_len} is more than --max-model-len "
            f"{settings.max_model_len}"
        )
    if not settings.compare:
        for name in OF_COMPARISON:
            if configuration.given(name):
                raise UsageError(f"{configuration.source(name)} goes with --compare")
        if len(settings.request_rate) > 1:
            raise UsageError(f"{configuration.source('request_rate')}: several rates go with --compare")
    elif settings.serve:
        raise UsageError("--compare and --serve: allowed: one of them")
    elif not settings.num_prompts:
        raise UsageError(f"{configuration.source('num_prompts')} 0: --compare needs requests")
    elif settings.sweep and configuration.given("request_rate"):
        raise UsageError(f"--sweep and {configuration.source('request_rate')}: allowed: one of them")


def dry_run(plan: Plan[Settings]) -> None:
    """Prints every command with its environment as a shell takes it."""
    check, plain, pair, result = (f"compare-{step}" for step in COMPARE_STEPS)
    names = ["model"] if plan.model.built else []
    names += [check, *plain_servers(plan), PLAIN_PROXY, plain] if plan.settings.compare else []
    names += ["kv-server"] if plan.backend.runs_server else []
    names += [*plan.servers, "proxy"]
    if plan.settings.compare:
        names += ["probe", pair, result]
    elif not plan.settings.serve:
        names.append("load")
    elif plan.settings.kv_load == "auto":
        names.append("calibration")
    for name in names:
        log = "" if name in ("model", "load", check, plain, pair, result) else f" (log: {log_of(plan, name)})"
        print(f"# {name}{log}\n{build_command(plan, name).shell_line(plan.environ)}")
