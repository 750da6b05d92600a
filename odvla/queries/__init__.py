"""Scene features to tokens; one file a query module."""
