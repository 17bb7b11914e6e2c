"""Layers that hold pruned weights packed, in memory and at work."""
