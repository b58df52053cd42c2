"""The folded form -> results: the fused module, its engine, backends, graphs and tuning."""
