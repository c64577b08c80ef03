"""The numerical operators of HDMIL: plain PyTorch on a CPU, Triton kernels on a GPU."""

from hdmil_lib.kernels.chebyshev_kan import chebyshev_kan
from hdmil_lib.kernels.gated_attention import gated_attention
from hdmil_lib.kernels.gated_attention_pool import gated_attention_pool
from hdmil_lib.kernels.gumbel_mask import gumbel_mask
from hdmil_lib.kernels.lipn_forward import lipn_forward
from hdmil_lib.kernels.s4d_convolution import s4d_convolution
from hdmil_lib.kernels.segment_softmax_pool import segment_softmax_pool
from hdmil_lib.kernels.selective_scan import selective_scan
from hdmil_lib.kernels.self_distillation_pool import self_distillation_pool
from hdmil_lib.kernels.tile_preprocess import tile_preprocess
from hdmil_lib.kernels.tile_projection import tile_projection
from hdmil_lib.kernels.tissue_statistics import tissue_statistics

__all__ = [
    "chebyshev_kan",
    "gated_attention",
    "gated_attention_pool",
    "gumbel_mask",
    "lipn_forward",
    "s4d_convolution",
    "segment_softmax_pool",
    "selective_scan",
    "self_distillation_pool",
    "tile_preprocess",
    "tile_projection",
    "tissue_statistics",
]
