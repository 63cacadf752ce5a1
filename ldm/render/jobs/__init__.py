"""From entries to jobs: every setting resolved, each image with a key and a file name."""
