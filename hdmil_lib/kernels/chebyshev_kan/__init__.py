from hdmil_lib.kernels.chebyshev_kan.reference import chebyshev_kan

__all__ = ["chebyshev_kan"]
