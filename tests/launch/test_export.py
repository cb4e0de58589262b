"""Manifests, compose file and units: what is checked in is what the code writes, and names only what there is."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kustomize
import pytest
import yaml

from disagg_prefill_lmcache_v1.launch.export import command_line, yaml_text
from disagg_prefill_lmcache_v1.launch.export.kubernetes import SECRET, USER, manifests
from disagg_prefill_lmcache_v1.launch.export.kustomize import difference, intersection
from disagg_prefill_lmcache_v1.launch.export.settings import ROOT as TARGET
from disagg_prefill_lmcache_v1.proxy.settings import build_parser

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "cuda", "gaudi", "redis", "nixl")
# What each overlay is: a device and a way of the KV cache.
STACKS = {"cpu": ("cpu", "lm"), "cuda": ("cuda", "lm"), "gaudi": ("hpu", "lm"), "redis": ("cuda", "redis"),
          "nixl": ("cuda", "nixl")}  # fmt: skip
CHECKED_IN = {
    "kubernetes": ("kustomize",),
    "compose": ("compose", "--device", "cpu"),
    "systemd": ("systemd", "--device", "cuda"),
}
HARD_LIMIT_S = 120


def exported(*argv: str, **environ: str) -> dict[str, str]:
    configuration = command_line.read(argv, environ)
    return command_line.render(configuration.words[0], argv, configuration, environ)


@pytest.fixture(autouse=True)
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools of cards are not asked: files are the same on every machine."""
    monkeypatch.setattr("disagg_prefill_lmcache_v1.launch.devices.list_rows", lambda *_: [])


def objects_of(device: str, backend: str) -> kustomize.Objects:
    port = [] if backend == "nixl" else ["--kv-port", "8300"]
    texts = exported("kubernetes", "--device", device, "--backend", backend, *port)
    return {
        kustomize.key_of(each): each
        for name, text in texts.items()
        if name != "kustomization.yaml"
        for each in yaml.safe_load_all(text)
    }


def by_name(value: Any) -> Any:
    """The same with the variables of containers as a mapping: their order is not the same in all renderers."""
    if isinstance(value, dict):
        return {key: by_name({each["name"]: each for each in item} if key == "env" else item)
                for key, item in value.items()}  # fmt: skip
    if isinstance(value, list):
        items = [by_name(each) for each in value]
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True)) if all(map(is_named, value)) else items
    return value


def is_named(value: Any) -> bool:
    return isinstance(value, dict) and ("name" in value or "mountPath" in value)


def containers(objects: kustomize.Objects) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, container and pod of all Deployments."""
    for (kind, name), thing in objects.items():
        if kind == "Deployment":
            pod = thing["spec"]["template"]["spec"]
            for container in [*pod.get("initContainers", ()), *pod["containers"]]:
                yield name, container, pod


# --- what is checked in


@pytest.mark.parametrize("folder", CHECKED_IN)
def test_what_is_checked_in_is_what_the_code_writes(folder: str) -> None:
    texts = exported(*CHECKED_IN[folder])
    assert {name: (DEPLOY / folder / name).read_text() for name in texts} == texts, "make fix"
    others = {path.relative_to(DEPLOY / folder).as_posix() for path in (DEPLOY / folder).rglob("*") if path.is_file()}
    assert {name for name in others if not name.startswith("monitoring/")} == set(texts)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_the_export_of_its_device_and_backend(overlay: str) -> None:
    rendered = kustomize.render(KUBERNETES / "overlays" / overlay)
    assert by_name(rendered) == by_name(objects_of(*STACKS[overlay]))


def test_components_go_with_every_device_that_has_cards() -> None:
    objects = kustomize.render(KUBERNETES / "overlays" / "gaudi")
    kustomize.render(KUBERNETES / "components" / "redis", objects)
    assert by_name(objects) == by_name(objects_of("hpu", "redis"))


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed; the own renderer has been compared")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_renders_the_same(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HARD_LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    found = {kustomize.key_of(each): each for each in yaml.safe_load_all(done.stdout)}
    assert by_name(found) == by_name(kustomize.render(KUBERNETES / "overlays" / overlay))
    refer_to_what_stands_before(found)


# --- schemas


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_follow_the_schema_of_kubernetes(overlay: str) -> None:
    objects = kustomize.render(KUBERNETES / "overlays" / overlay)
    if overlay == "cuda":
        kustomize.render(KUBERNETES / "components" / "autoscaling", objects)
        assert ("HorizontalPodAutoscaler", "decoder") in objects
        assert "replicas" not in objects["Deployment", "decoder"]["spec"]
    for thing in objects.values():
        kubernetes_validate.validate(thing, "1.30", strict=True)
    wrong = copy.deepcopy(objects["Deployment", "proxy"])
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.30", strict=True)


@pytest.mark.parametrize("flags", [("cpu", "lm"), ("cuda", "redis"), ("hpu", "nixl")], ids="-".join)
def test_compose_files_follow_their_schema(flags: tuple[str, str]) -> None:
    import check_jsonschema

    path = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(path.read_text())
    content = yaml.safe_load(exported("compose", "--device", flags[0], "--backend", flags[1])["compose.yaml"])
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "service": {}}, schema)
    services = content["services"]
    assert all(set(each.get("depends_on", ())) <= set(services) for each in services.values())
    assert all(set(each.get("networks", ())) <= set(content["networks"]) for each in services.values())
    assert "store" not in services["proxy"]["networks"]
    assert services["proxy"]["ports"] == ["127.0.0.1:8000:8000"]
    if flags[0] == "hpu":
        assert services["decoder"]["environment"]["HABANA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize("backend", ["lm", "redis", "shm", "nixl", "mp"])
def test_units_are_what_systemd_takes(backend: str, tmp_path: Path) -> None:
    role = "decoder"
    texts = exported("systemd", "--device", "cpu", "--backend", backend, f"--{role}s", "2")
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert f"disagg-prefill-{role}2.service" in texts
    proxy = texts["disagg-prefill-proxy.service"]
    assert proxy.count(f"disagg-prefill-{role}2.service") == 2, "started after it and stopped before it"
    if shutil.which("systemd-analyze"):
        command = ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HARD_LIMIT_S, check=False)
        assert done.returncode == 0, done.stderr
    for text in texts.values():
        for line in text.splitlines():
            assert re.fullmatch(r"|#.*|\[(Unit|Service|Install)\]|[A-Z]\w+=.*", line), line


# --- rules of our own


def refer_to_what_stands_before(objects: kustomize.Objects) -> None:
    """$(NAME) is filled in from variables that stand before it."""
    for name, container, _ in containers(objects):
        known: set[str] = set()
        for variable in container.get("env", ()):
            assert set(re.findall(r"(?<!\$)\$\((\w+)\)", variable.get("value", ""))) <= known, (name, variable)
            known.add(variable["name"])
        for word in container["command"]:
            assert set(re.findall(r"(?<!\$)\$\((\w+)\)", word)) <= known, (name, word)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_need_no_rights_and_stop_in_time(overlay: str) -> None:
    objects = kustomize.render(KUBERNETES / "overlays" / overlay)
    refer_to_what_stands_before(objects)
    for name, container, pod in containers(objects):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["enableServiceLinks"] is False, "its variables would be taken for settings (DISAGG_PROXY_PORT)"
        assert {each["name"] for each in container["volumeMounts"]} <= {each["name"] for each in pod["volumes"]}
        assert set(container["resources"]) == {"requests", "limits"}
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if name != "kv-server" and container["name"] == "main":
            number = {flag: int(value) for flag, value in zip(hook[3::2], hook[4::2], strict=True) if value.isdigit()}
            longest = number["--settle"] + number.get("--limit", 0)
            if name == "proxy":
                longest += int(container["command"][container["command"].index("--drain-timeout-s") + 1])
            assert pod["terminationGracePeriodSeconds"] > longest
    cards = objects["Deployment", "decoder"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    wanted = {"cpu": None, "gaudi": "habana.ai/gaudi"}.get(overlay, "nvidia.com/gpu")
    assert {key for key in cards if "/" in key} == ({wanted} if wanted else set())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_port_that_is_named_is_listened_on(overlay: str) -> None:
    objects = kustomize.render(KUBERNETES / "overlays" / overlay)
    listens: dict[str, set[int]] = {}
    for name, container, _ in containers(objects):
        if container["name"] != "main":
            continue
        words = container["command"]
        told = {int(words[index + 1]) for index, word in enumerate(words) if word == "--port"}
        if not told:  # lm_server HOST PORT
            told = {int(words[-1])}
        listens[name] = told
        ports = {each["containerPort"] for each in container["ports"]}
        assert told <= ports
        probe = container["startupProbe"]
        assert probe.get("httpGet", probe.get("tcpSocket"))["port"] == "main"
        if extra := ports - told:  # of NIXL
            values = {each["name"]: each.get("value", "") for each in container["env"]}
            assert {values["VLLM_NIXL_SIDE_CHANNEL_PORT"]} == {str(port) for port in extra}
    for (kind, name), thing in objects.items():
        if kind == "Service":
            assert {each["port"] for each in thing["spec"]["ports"]} == listens[name]
            assert thing["spec"]["selector"] == objects["Deployment", name]["spec"]["selector"]["matchLabels"]
        if kind == "NetworkPolicy" and name != "all":
            first = thing["spec"]["ingress"][0]
            assert {each["port"] for each in first["ports"]} == listens[name]
    # An address that one server is given for another is a Service's name and port.
    text = json.dumps([container for _, container, _ in containers(objects)])
    named = set(re.findall(r"(?:http|lm|@|redis)(?:://)?(prefiller|decoder|kv-server):(\d+)", text))
    assert {("prefiller", "8100"), ("decoder", "8200")} <= named
    assert all(int(port) in listens[host] for host, port in named)


def test_the_store_is_reached_by_servers_alone() -> None:
    objects = kustomize.render(KUBERNETES / "overlays" / "redis")
    assert objects["NetworkPolicy", "all"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    (rule,) = objects["NetworkPolicy", "kv-server"]["spec"]["ingress"]
    (peer,) = rule["from"]
    assert peer["podSelector"]["matchExpressions"][0]["values"] == ["prefiller", "decoder"]
    assert "--requirepass" in objects["Deployment", "kv-server"]["spec"]["template"]["spec"]["containers"][0]["command"]
    for name in ("prefiller", "decoder"):
        assert objects["Service", name]["spec"]["clusterIP"] == "None"


def test_a_secret_of_the_store_is_there_before_its_servers() -> None:
    """systemd makes the file that the launcher would have made; in pods and containers it comes from their secrets."""
    for backend, with_secret in (("redis", {"kv-server", "prefiller", "decoder"}), ("nixl", set())):
        units = exported("systemd", "--device", "cuda", "--backend", backend)
        made = '"disagg_prefill_lmcache_v1.same_user" "/run/disagg-prefill/kv_secret"'
        makes = {name for name, text in units.items() if made in text}
        assert makes == {f"disagg-prefill-{name}.service" for name in with_secret}
    for text in (exported("compose", "--device", "cuda", "--backend", "redis")["compose.yaml"],
                 *exported("kubernetes", "--device", "cuda", "--backend", "redis").values()):  # fmt: skip
        assert "kv_secret" not in text


def test_every_flag_path_and_module_that_is_named_exists() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    vllm = {flag for action in make_arg_parser(FlexibleArgumentParser())._actions for flag in action.option_strings}
    proxy = {flag for action in build_parser()._actions for flag in action.option_strings}
    redis = {"--bind", "--port", "--save", "--appendonly", "--maxmemory", "--maxmemory-policy", "--unixsocket",
             "--unixsocketperm", "--io-threads", "--requirepass"}  # fmt: skip
    drain = {"--settle", "--limit", "--url"}
    for overlay in OVERLAYS:
        for name, container, _ in containers(kustomize.render(KUBERNETES / "overlays" / overlay)):
            known = {"proxy": proxy, "kv-server": redis}.get(name, vllm | {"--output"})
            flags = {word for word in container["command"] if word.startswith("--")}
            assert flags <= known, (name, flags - known)
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
            assert {word for word in hook if word.startswith("--")} <= drain
            text = json.dumps(container)
            for path in set(re.findall(rf"{TARGET}/([\w./-]+)", text)) - {".models", ".models/tiny-llama"}:
                assert (ROOT / path).exists(), path
            for module in set(re.findall(r"disagg_prefill_lmcache_v1(?:\.\w+)+", text)):
                path = ROOT / module.replace(".", "/")
                found = (
                    path.with_suffix(".py").exists()
                    or f"class {path.name}" in path.parent.with_suffix(".py").read_text()
                )
                assert found or path.is_dir(), module


def test_every_variable_that_is_set_is_read_by_something() -> None:
    """By this project's code or profiles; others are those of Hugging Face and of the cluster."""
    code = "".join(path.read_text() for path in (ROOT / "disagg_prefill_lmcache_v1").rglob("*.py"))
    code += "".join(path.read_text() for path in (ROOT / "disagg_prefill_lmcache_v1" / "profiles").iterdir())
    others = {"HOME", "HF_HOME", "HF_TOKEN", "REDIS_PASSWORD", "DISAGG_PROXY_API_KEY"}
    for overlay in OVERLAYS:
        for _, container, _ in containers(kustomize.render(KUBERNETES / "overlays" / overlay)):
            for variable in container["env"]:
                name = variable["name"]
                assert name in code or name in others or name.startswith("DISAGG_KV_"), name


def test_autoscalers_use_metrics_that_the_docs_name() -> None:
    objects = kustomize.read(KUBERNETES / "components" / "autoscaling" / "autoscalers.yaml")
    adapter = yaml.safe_load((KUBERNETES / "monitoring" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    made = {rule["name"]["as"]: re.search(r'__name__="([^"]+)"', rule["seriesQuery"])[1] for rule in adapter}
    page = (ROOT / "docs" / "monitoring.md").read_text()
    used = {metric["pods"]["metric"]["name"] for each in objects.values() for metric in each["spec"]["metrics"]
            if metric["type"] == "Pods"}  # fmt: skip
    assert used == set(made)
    assert all(series in page for series in made.values())
    scrape = yaml.safe_load((KUBERNETES / "monitoring" / "prometheus.yml").read_text())["scrape_configs"][0]
    jobs = {rule["replacement"] for rule in scrape["relabel_configs"] if rule.get("target_label") == "job"}
    assert jobs == {"disagg-$1"}
    assert 'job="disagg-prefiller"' in page


def test_containers_have_the_versions_of_the_project_and_the_user_of_the_pods() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    files = sorted((DEPLOY / "containers").iterdir())
    assert {path.stem for path in files} == {"proxy", "server", "server-cpu"}
    for path in files:
        text = path.read_text()
        for name, version in re.findall(r"\b([\w-]+)==([\w.+]+)", text):
            if name != "torch":
                assert f'"{name}=={version}"' in project, (path.name, name)
        assert f"USER {USER}:{USER}" in text
        assert f"--uid {USER}" in text
        for source in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
            assert all((ROOT / each).exists() for each in source.split()), source
    torch = re.search(r"SETUP_TORCH=(\S+)", (ROOT / "disagg_prefill_lmcache_v1/profiles/cpu.env").read_text())[1]
    assert f"torch=={torch}+cpu" in (DEPLOY / "containers" / "server-cpu.Containerfile").read_text()
    content = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    for service in content["services"].values():
        assert (DEPLOY / "compose" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


# --- the verb


def test_files_do_not_depend_on_the_callers_environment() -> None:
    argv = ("compose", "--device", "cpu")
    plain = exported(*argv)
    assert exported(*argv, OMP_NUM_THREADS="7", PYTHONPATH="/elsewhere", VIRTUAL_ENV="/env", HF_TOKEN="s3cret") == plain
    assert "s3cret" not in exported(*argv, DISAGG_PROXY_API_KEY="s3cret")["compose.yaml"]
    assert "KV_LM_SIZE: \"7gb\"" in exported(*argv, KV_LM_SIZE="7gb")["compose.yaml"]  # fmt: skip
    assert str(ROOT) not in plain["compose.yaml"]


def test_a_store_of_ones_own_is_used_and_none_started() -> None:
    files = exported("kubernetes", "--device", "cuda", "--backend", "redis", "--kv-url", "redis://store.example:6379")
    assert "kv-server.yaml" not in files
    assert "redis://store.example:6379" in files["prefiller.yaml"]
    assert SECRET in files["prefiller.yaml"]


def test_several_servers_of_a_role_have_a_name_each() -> None:
    flags = ("--device", "cuda", "--backend", "lm", "--decoders", "2", "--tensor-parallel-size", "2")
    files = exported("kubernetes", *flags)
    for name in ("decoder", "decoder2"):
        deployment, service, _ = yaml.safe_load_all(files[f"{name}.yaml"])
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        assert deployment["metadata"]["name"] == service["metadata"]["name"] == name
        assert service["spec"]["ports"][0]["port"] == 8200
        assert {each["containerPort"] for each in container["ports"]} == {8200}
    proxy = next(yaml.safe_load_all(files["proxy.yaml"]))["spec"]["template"]["spec"]["containers"][0]["command"]
    assert [proxy[index + 1] for index, word in enumerate(proxy) if word == "--decoder"] == [
        "http://decoder:8200",
        "http://decoder2:8200",
    ]
    policies = {each["metadata"]["name"]: each for each in yaml.safe_load_all(files["network-policies.yaml"])}
    (peer,) = policies["kv-server"]["spec"]["ingress"][0]["from"]
    assert peer["podSelector"]["matchExpressions"][0]["values"] == ["prefiller", "decoder", "decoder2"]
    services = yaml.safe_load(exported("compose", *flags)["compose.yaml"])["services"]
    cards = [
        services[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name in ("prefiller", "decoder", "decoder2")
    ]
    assert cards == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert set(services["proxy"]["depends_on"]) == {"prefiller", "decoder", "decoder2"}
    unit = exported("systemd", *flags)["disagg-prefill-decoder2.service"]
    assert "CUDA_VISIBLE_DEVICES=4,5" in unit
    assert '"--port" "8201"' in unit
    assert "CacheDirectory=" in unit


def test_servers_of_nixl_tell_an_address_that_they_have() -> None:
    pods = objects_of("cuda", "nixl")
    services = yaml.safe_load(exported("compose", "--device", "cuda", "--backend", "nixl")["compose.yaml"])["services"]
    for name, port in (("prefiller", "8500"), ("decoder", "8501")):
        (container,) = pods["Deployment", name]["spec"]["template"]["spec"]["containers"]
        values = {each["name"]: each for each in container["env"]}
        assert values["VLLM_NIXL_SIDE_CHANNEL_HOST"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
        assert values["VLLM_NIXL_SIDE_CHANNEL_PORT"]["value"] == port
        assert services[name]["environment"]["VLLM_NIXL_SIDE_CHANNEL_HOST"] == name


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ((), "name what to write"),
        (("helm", "--output", "x"), "allowed: kubernetes, kustomize, compose, systemd"),
        (("kubernetes",), "--output is needed"),
        (("kustomize", "--output", "x", "--device", "cpu"), "--device: kustomize writes all of them"),
        (("kubernetes", "--output", "x", "--backend", "shm"), "allowed here: lm, redis, nixl"),
        (("compose", "--output", "x", "--namespace", "Big"), "--namespace 'Big': allowed: small letters"),
        (("kubernetes", "--output", "x", "--backend", "redis", "--kv-url", "redis://:s3cret@h:1"), "no password"),
        (("systemd", "--output", "/proc/none"), "cannot write /proc/none"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(argv: tuple[str, ...], told: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "disagg_prefill_lmcache_v1.launch", "export", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HARD_LIMIT_S, check=False)
    assert done.returncode == (1 if "/proc/none" in argv else 2)
    assert told in done.stderr
    assert "s3cret" not in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (ROOT / "x").exists()


def test_the_verb_writes_what_it_names(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "disagg_prefill_lmcache_v1.launch", "export", "compose", "--device", "cpu"]
    command += ["--output", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HARD_LIMIT_S, check=True)
    assert done.stdout.split() == [str(tmp_path / "new" / "compose.yaml")]
    assert (tmp_path / "new" / "compose.yaml").read_text() == (DEPLOY / "compose" / "compose.yaml").read_text()


# --- parts


@pytest.mark.parametrize(
    "value",
    [
        {"a": ["x", {"b": 1, "c": [True, None]}], "d": {}, "e": [], "f": [["deep"]]},
        ["yes", "no", "1", "1.5", "", " x", "x ", "a: b", "#c", "- d", "{e}", "ü", "a\nb", '"', "null", "08:30", "0x1"],
        {"key: with": "$(X)", "1": "@a", "true": "%d", "list": [{"one": 1, "two": 2}, {"three": "http://a:1"}]},
    ],
)
def test_yaml_is_read_back_as_it_was(value: Any) -> None:
    assert yaml.safe_load(yaml_text.dump(value)) == value


def test_a_difference_makes_the_new_of_the_old() -> None:
    old = {"a": 1, "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}], "words": ["a"], "gone": {"b": 2}}
    new = {"a": 1, "env": [{"name": "Y", "value": "3"}, {"name": "Z", "value": "4"}], "words": ["c"]}
    assert by_name(kustomize.merge(old, difference(old, new))) == by_name(new)
    assert difference(old, old) == {}
    assert intersection([old, new]) == {"a": 1}


def test_words_with_a_meaning_to_systemd_stay_as_they_are() -> None:
    from disagg_prefill_lmcache_v1.launch.export.systemd import quoted

    assert quoted('a "b" \\ 100%') == '"a \\"b\\" \\\\ 100%%"'
    assert shlex.split(quoted('{"a":"b c"}')) == ['{"a":"b c"}']


def test_a_stack_names_every_server_once() -> None:
    configuration = command_line.read(("kubernetes", "--device", "cuda"), {})
    stack = command_line._describe(configuration, {}, apart=True)
    assert list(stack.servers) == ["kv-server", "prefiller", "decoder", "proxy"]
    names = [kustomize.key_of(each) for objects in manifests(stack).values() for each in objects]
    assert len(set(names)) == len(names)
