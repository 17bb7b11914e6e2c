"""Safetensors in and out: saving in one step, verifying and inspecting from the files."""
