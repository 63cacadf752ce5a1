"""Prompt files -> images: read (parse), made into jobs (expand, jobs), recorded (manifest)."""
