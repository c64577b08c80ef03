from hdmil_lib.kernels.chebyshev_kan.op import chebyshev_kan

__all__ = ["chebyshev_kan"]
