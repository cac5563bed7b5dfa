"""The command line: arguments, one-line errors, sweeps."""
