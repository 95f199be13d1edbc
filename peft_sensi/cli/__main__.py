"""`python -m peft_sensi.cli` is the command `peft-sensi`, for launchers and where its script is not on the path."""

from . import main


main()
