"""What is asked of the model: noise schedule, timesteps, objective, guidance, samplers; math, no modules or ranks."""
