"""Benchmarks: speed beside a yardstick, in one process, taking turns."""
