"""In the place of mamba_ssm's CUDA extension, so that its modules can be imported; what they would call is not here."""
