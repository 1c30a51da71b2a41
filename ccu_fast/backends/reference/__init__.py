"""Plain torch, any device and dtype, fp64 included: the definition the other backends are tested against."""
