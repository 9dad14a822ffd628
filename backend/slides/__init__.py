"""Slides: where they may come from, how they are read, where tissue is, which tiles make a bag."""
