"""Captioned images: folders of the user, and scenes drawn from an emoji font."""
