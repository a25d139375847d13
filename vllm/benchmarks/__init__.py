"""Benchmarks and the accuracy tasks that `vllm bench` runs."""
