"""Cut a safetensors checkpoint tensor by tensor, without building the model."""
