"""What all packages use: errors, checks of outside values, file access, several processes, unit states, and text."""
