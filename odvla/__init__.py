"""The OpenDriveVLA model and its mathematics: torch only."""
