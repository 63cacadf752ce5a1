"""What a run leaves behind: the manifest and the report."""
