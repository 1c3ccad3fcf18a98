"""What the product costs, measured. `launch/benchmark.py` runs them by name.

One module a benchmark, with a `run(workdir, ...)` that measures, prints a
table and keeps it (`output.save`) as markdown and JSON.
"""
