"""Figures of detections against truth: no torch, so that they can be computed anywhere."""
