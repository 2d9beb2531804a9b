"""`python -m nnunet_lite` is `nnlite`."""

from nnunet_lite.cli import main

main()
