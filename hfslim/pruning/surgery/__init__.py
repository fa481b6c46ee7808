"""Surgery: make a structure physical, and prove that the cut model equals the gated one."""
