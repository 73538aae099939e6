"""Benchmarks: one file a subject, all through bench.timing. Run with `qwen2vl-fast bench SUBJECT` in a checkout."""
