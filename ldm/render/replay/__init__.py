"""From an image or its metadata back to the settings that drew it."""
