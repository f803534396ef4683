"""Files of results that grow line by line and survive a kill."""
