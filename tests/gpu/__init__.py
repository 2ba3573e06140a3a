"""Checks of what runs on CUDA: kernels against their references, and the engine on CUDA against the engine on the CPU.

``tests/gpu/run.sh`` runs them all on a bare image. They need torch, and for whole models transformers; no pytest.
"""
