"""The command line: Hydra's errors in one line, arguments, sweeps."""
