from hdmil_lib.kernels.lipn_forward.op import lipn_forward

__all__ = ["lipn_forward"]
