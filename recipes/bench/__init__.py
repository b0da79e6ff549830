"""Benchmarks: what apportion takes, beside what one would use instead, and beside what no method can do without."""
