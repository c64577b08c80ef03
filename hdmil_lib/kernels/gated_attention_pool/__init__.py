from hdmil_lib.kernels.gated_attention_pool.op import gated_attention_pool

__all__ = ["gated_attention_pool"]
