"""`python -m serving.cli` is `nearfar`."""

from serving.cli import main

main()
