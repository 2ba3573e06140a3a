"""``python -m whet.cli``."""

from whet.cli import main

main()
