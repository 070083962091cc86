"""What a step takes, and the plan that fits: tile, retained tiles, where halos are kept."""
