"""What every package may use: errors, checks of outside values, file handling, several processes, text formatting."""
