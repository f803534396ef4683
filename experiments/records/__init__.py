"""Result files that are written line by line and survive a kill."""
