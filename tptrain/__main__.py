"""`python -m tptrain` is the command `tptrain`."""

from tptrain.cli import main

main()
