"""The command line: shared flags, checkpoints by name, several processes, dry runs, temperature profiles."""
