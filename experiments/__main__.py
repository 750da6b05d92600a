"""`python -m experiments` is `lightning_app.py`, from any folder."""

from experiments.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
