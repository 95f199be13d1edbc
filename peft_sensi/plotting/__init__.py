"""Pictures. Arrays and names of units go in, picture files come out. Needs matplotlib (`peft-sensi[plots]`)."""
