"""Requests made up from vLLM's own OpenAPI schema, sent through the proxy: a 5xx or a hang only where vLLM has it too.

test_stack.py runs a few cases on a real stack; this file is also a script for longer runs, on a stack that was started
with --serve:

    python tests/stack/schema_fuzz.py --proxy http://127.0.0.1:8000 --decoder http://127.0.0.1:8200 --cases 200 --seed 7

Every case that the proxy answers with an error, or not at all, is asked of the decoder as well, which must refuse it
too: a 4xx by a 4xx with the same status (the proxy's own 400 and 415 by any), a 5xx by a 5xx.
"""

from __future__ import annotations

import argparse
import collections
import functools
import sys
import warnings
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

# Not here: routes that change the server (scaling, pausing), the proxy's own (/health, /metrics), and names for the
# same thing.
ROUTES = (
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("GET", "/v1/responses/{response_id}"),
    ("POST", "/v1/responses/{response_id}/cancel"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/version"),
)
LIMIT_FIELDS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}
_MESSAGES = [{"role": "user", "content": "Say it in few words."}]
PROMPTS: dict[str, tuple[str, Any]] = {
    "/v1/completions": ("prompt", "Say it in few words."),
    "/v1/chat/completions": ("messages", _MESSAGES),
    "/v1/responses": ("input", _MESSAGES),
    "/v1/messages": ("messages", _MESSAGES),
}
# A case shall cost little: these are not the point.
HIGHEST = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "min_tokens": 4, "n": 2, "best_of": 2}
CASE_S = 60.0  # longest time for one answer


class Fuzz:
    """Asks both servers; ``wrong`` lists what the proxy did that vLLM does not, ``seen`` counts the answers."""

    def __init__(self, proxy: str, decoder: str) -> None:
        self.proxy, self.decoder = proxy, decoder
        self.session = requests.Session()
        self.model = self.session.get(proxy + "/v1/models", timeout=CASE_S).json()["data"][0]["id"]
        self.raw = self.session.get(proxy + "/openapi.json", timeout=CASE_S).json()
        self.schema = schemathesis.openapi.from_dict(self.raw)
        self.wrong: list[str] = []
        self.number = 0
        self.seen: collections.Counter[str] = collections.Counter()

    def run(self, cases: int, number: int | None = None) -> None:
        """Up to ``cases`` good and as many bad requests for each route; without a ``number`` always the same ones."""
        options = settings(
            max_examples=cases, deadline=None, database=None, phases=[Phase.generate], derandomize=number is None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        for method, path in ROUTES:
            operation = self.schema[path][method]
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
                    continue  # nothing that could be wrong

                @options
                @given(case=operation.as_strategy(generation_mode=mode))
                def one(case: Any) -> None:
                    self.check(case)

                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    (one if number is None else seed(number)(one))()

    def check(self, case: Any) -> None:
        """Ask the proxy, and where it gives no answer or an error, the decoder."""
        if isinstance(case.body, dict):
            self.tame(case.operation.path, case.body, case.meta.generation.mode is GenerationMode.POSITIVE)
        status, text = self.ask(self.proxy, case)
        self.seen[f"{case.operation.method.upper()} {case.operation.path} {status or 'nothing'}"] += 1
        if status and status < 400:
            return
        wanted, reason = self.ask(self.decoder, case)
        own = '"stage": "proxy"' in text and status in (400, 415)
        if status == 0:
            agree = wanted == 0
        elif status >= 500:
            agree = wanted >= 500
        else:
            agree = status == wanted or (own and 400 <= wanted < 500)
        if not agree:
            command = case.as_curl_command()
            self.wrong.append(f"{status} ({text[:300]}) where vLLM answers {wanted} ({reason[:300]}): {command[:2000]}")

    def tame(self, path: str, body: dict[str, Any], good: bool) -> None:
        """Ask for the served model and for few tokens; make two of three good requests likely to be answered."""
        self.number += 1
        # The proxy refuses it, vLLM takes it; Hypothesis takes names from the code that is loaded, so that it comes up.
        body.pop("kv_transfer_params", None)
        if good and path in PROMPTS and self.number % 3:
            # A good prompt with few of the other fields: all at once are always refused by some rule.
            known = [(key, item) for key, item in body.items() if key in self.fields(path) and item is not None]
            body.clear()
            body.update(known[: self.number % 5])
            name, value = PROMPTS[path]
            body[name] = value
        if isinstance(body.get("model"), str | None):
            body["model"] = self.model
        for name, highest in HIGHEST.items():
            if isinstance(body.get(name), int) and body[name] > highest:
                body[name] = highest
        limit = LIMIT_FIELDS.get(path)
        if limit and body.get(limit) is None:
            body[limit] = HIGHEST[limit]

    @functools.cache  # noqa: B019 (there is one Fuzz)
    def fields(self, path: str) -> frozenset[str]:
        """Names of the body's fields."""
        schemas = self.raw["components"]["schemas"]
        reference = self.raw["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        return frozenset(schemas[reference.rpartition("/")[2]]["properties"])

    def ask(self, url: str, case: Any) -> tuple[int, str]:
        """Status and text of the answer; status 0 if there was none, or only part of it."""
        try:
            response = case.call(base_url=url, session=self.session, timeout=CASE_S)
        except requests.RequestException as error:
            return 0, f"{type(error).__name__}: {error}"
        return response.status_code, response.text


def main() -> int:
    """Command line entry; exit status 1 if the proxy did what vLLM does not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proxy", default="http://127.0.0.1:8000", help="URL of the proxy (default: %(default)s)")
    parser.add_argument("--decoder", default="http://127.0.0.1:8200", help="its decoder (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=50, help="good and bad ones for each route (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="other cases than always the same ones")
    arguments = parser.parse_args()
    fuzz = Fuzz(arguments.proxy, arguments.decoder)
    fuzz.run(arguments.cases, arguments.seed)
    for line, count in sorted(fuzz.seen.items()):
        print(f"{count:6} {line}")
    for text in fuzz.wrong:
        print("WRONG:", text, file=sys.stderr)
    print(f"{sum(fuzz.seen.values())} cases, {len(fuzz.wrong)} wrong")
    return 1 if fuzz.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
