from hdmil_lib.kernels.self_distillation_pool.op import self_distillation_pool

__all__ = ["self_distillation_pool"]
