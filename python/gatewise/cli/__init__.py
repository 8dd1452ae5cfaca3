"""The command line: its options, and a module for each command."""
