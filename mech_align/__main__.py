"""``python -m mech_align`` is the same door as the ``mech-align`` command."""

from mech_align.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
