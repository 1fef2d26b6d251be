"""Launchers: one module a family of kernels, named like its .cu file.

Each checks shapes, chooses grid and variant, and launches on a `kernels.device.Device`. Variants
are stated at module level as `kernels.specialisation.Family`. Nothing here imports `cuda`.
"""
