"""Limits of the GPU kernel that are known without importing Triton."""

MAX_STATES = 16  # states per channel, which the kernel holds in registers
