"""Sheets of images: grids with axes, contact sheets, the gallery."""
