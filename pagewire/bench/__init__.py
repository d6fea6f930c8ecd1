"""Measures a running service: the exact workloads, and drivers that count and time what comes back.

Configs, recorded results and the generated tables are in `benchmarks/` of the repository; the code is here because
`pagewire bench` is part of the installed command.
"""
