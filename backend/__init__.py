"""Whole-slide images in Label Studio: pre-annotation by Whole Slide Concepts. Research use only."""

__version__ = "0.1.0"
