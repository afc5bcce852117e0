"""One file for each attribution method."""
