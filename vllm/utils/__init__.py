"""Helpers that know nothing of the engine. Import the module you need; nothing is re-exported, so `import vllm.utils` stays free of torch."""
