"""Entry script: trains, tests and asks OpenDriveVLA models. `python lightning_app.py --help`."""

from experiments.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
