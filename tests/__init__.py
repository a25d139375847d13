"""The tests mirror vllm/ path for path; kernels, csrc and structure have folders of their own."""
