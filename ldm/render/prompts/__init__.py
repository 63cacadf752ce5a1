"""Prompt files, line by line, as entries of checked settings."""
