"""What a cluster does with a run: its launch, its signals, its lost processes, and jobs submitted to it."""
