from hdmil_lib.kernels.segment_softmax_pool.op import segment_softmax_pool

__all__ = ["segment_softmax_pool"]
