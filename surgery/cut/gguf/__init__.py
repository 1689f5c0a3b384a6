"""A cut as one GGUF file, by llama.cpp's names: the decision, the metadata, the writing and the checks."""
