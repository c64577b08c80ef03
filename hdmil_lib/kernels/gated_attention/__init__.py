from hdmil_lib.kernels.gated_attention.op import gated_attention

__all__ = ["gated_attention"]
