"""The drafter's kernels: the NumPy reference of each, the CUDA sources, and what launches them.

The only package that imports `cuda`; it imports none of ours. Start at `kernels.reference`.
"""
