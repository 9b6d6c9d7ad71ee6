"""The `rom` command."""
