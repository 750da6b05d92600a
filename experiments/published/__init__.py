"""Published tables as data, each with its source and, for plans, its protocol."""
