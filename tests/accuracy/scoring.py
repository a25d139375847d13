"""Scores of the bundled checkpoint's tasks through `LLM`: those that `vllm bench ab --accuracy` gives."""

from vllm.benchmarks.accuracy import accuracy, answers

__all__ = ["accuracy", "answers"]
