"""What every recipe shares: files, logs, processes, resuming."""

__all__: list[str] = []
