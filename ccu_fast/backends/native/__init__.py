"""The compiled CPU kernels of csrc, called through ccu_fast._C."""
