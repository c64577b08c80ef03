from hdmil_lib.kernels.selective_scan.op import selective_scan

__all__ = ["selective_scan"]
