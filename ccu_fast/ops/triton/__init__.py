"""What every operation's Triton kernels share."""
