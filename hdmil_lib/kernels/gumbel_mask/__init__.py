from hdmil_lib.kernels.gumbel_mask.op import gumbel_mask

__all__ = ["gumbel_mask"]
