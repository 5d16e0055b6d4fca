"""What the command line trains, read from a file of settings."""
