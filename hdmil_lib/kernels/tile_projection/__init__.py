from hdmil_lib.kernels.tile_projection.op import tile_projection

__all__ = ["tile_projection"]
