"""vLLM's own serving benchmark, several runs in one process: loading it takes longer than a short run.

Each line of standard input is a JSON list of its arguments (``--help`` tells them); a line of standard output says that
the run has ended. What the benchmark itself prints goes to standard error. (vLLM's console script for it does not start
with the CPU build.)
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as benchmark
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in sys.stdin:
        benchmark(parser.parse_args(json.loads(line)))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
