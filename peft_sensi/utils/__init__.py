"""Tools for all packages: errors, checks of values from outside, files, several processes, states of units, texts."""
