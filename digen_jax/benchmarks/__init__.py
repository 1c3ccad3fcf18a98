"""The bodies of `launch/benchmark.py`."""
