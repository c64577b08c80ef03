from hdmil_lib.kernels.gated_attention.reference import gated_attention

__all__ = ["gated_attention"]
