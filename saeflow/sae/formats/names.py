"""Names of the files of SAELens' folders, and so of saeflow's. Reading them loads no PyTorch."""

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
