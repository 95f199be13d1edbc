"""Drawing: arrays and names go in, picture files come out. Needs matplotlib."""
