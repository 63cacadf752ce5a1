"""Fine-tuning: options, presets, forecast, prior images."""
