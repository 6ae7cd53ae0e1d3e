"""What the commands of the command line do; :mod:`fxprune.cli` says what they are called."""
