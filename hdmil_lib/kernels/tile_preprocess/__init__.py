from hdmil_lib.kernels.tile_preprocess.op import tile_preprocess
from hdmil_lib.kernels.tile_preprocess.stain import StainTransform, fit_macenko, fit_reinhard, stain_vectors

__all__ = ["StainTransform", "fit_macenko", "fit_reinhard", "stain_vectors", "tile_preprocess"]
