"""``python -m ccu_fast`` is the command ``ccu-fast``."""

from ccu_fast.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
