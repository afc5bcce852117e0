"""The engine: from a call to the scores of masked rows."""
