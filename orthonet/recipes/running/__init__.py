"""What every recipe shares: files, logs, processes, resuming."""
