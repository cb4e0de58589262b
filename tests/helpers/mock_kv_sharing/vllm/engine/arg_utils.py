"""Part of the mock: the arguments that the KV sharing scripts give to vLLM."""

from __future__ import annotations

import argparse


class EngineArgs:
    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        for name in ("--model", "--kv-transfer-config", "--dtype"):
            parser.add_argument(name)
        for name in ("--tensor-parallel-size", "--max-model-len", "--max-num-batched-tokens"):
            parser.add_argument(name, type=int)
        parser.add_argument("--enforce-eager", action="store_true")
        return parser

    @staticmethod
    def from_cli_args(options: argparse.Namespace) -> argparse.Namespace:
        return options
