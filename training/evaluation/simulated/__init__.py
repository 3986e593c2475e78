"""Success in simulated benchmarks, in closed loop: MetaWorld, LIBERO and CALVIN."""
