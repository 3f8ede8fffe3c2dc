"""Benchmarks of orthonet against its peers; each module is a command, e.g. `benchmarks.presets`."""
