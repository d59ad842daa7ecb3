"""The flags of every command, one file each. Nothing heavy is imported here: help and mistyped flags answer
at once."""
