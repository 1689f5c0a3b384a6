"""Cut a checkpoint as a plan says, tensor by tensor, and check the result."""
