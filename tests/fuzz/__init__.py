"""A fuzzer that knows the structure of each file format; `python -m tests.fuzz --help` says how to run it."""
