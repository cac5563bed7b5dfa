"""What every other package uses: errors, files, seeds, devices, processes, the terminal."""
