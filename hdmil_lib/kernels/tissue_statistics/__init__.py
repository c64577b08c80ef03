from hdmil_lib.kernels.tissue_statistics.op import TissueStatistics, tissue_statistics

__all__ = ["TissueStatistics", "tissue_statistics"]
