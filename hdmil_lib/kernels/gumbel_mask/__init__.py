from hdmil_lib.kernels.gumbel_mask.reference import gumbel_mask

__all__ = ["gumbel_mask"]
