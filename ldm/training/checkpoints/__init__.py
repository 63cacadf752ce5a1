"""The exact state of a run on disk, and how a run resumes from it."""
