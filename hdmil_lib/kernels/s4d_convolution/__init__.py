from hdmil_lib.kernels.s4d_convolution.op import s4d_convolution

__all__ = ["s4d_convolution"]
