"""What :mod:`ccu_fast.patch` puts into other libraries, one file each; imported only when asked for."""
