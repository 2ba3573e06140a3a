"""Triton kernels. Only engine.ops.<operation> imports them, once engine.ops.backends has said that they can run.

They run under TRITON_INTERPRET=1 on a CPU too, which is how the ordinary tests prove them against their references.
"""
