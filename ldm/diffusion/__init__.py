"""Schedules, the denoiser, guidance and samplers; a network is known here only as a callable."""
