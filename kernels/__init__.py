"""Triton kernels: tensors in, tensors out. Installed as ``stflow_fast.kernels``; ``stflow_fast.ops`` chooses them."""
