"""An adapter in memory and on disk, from wherever it is."""
